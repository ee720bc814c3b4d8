"""DeepSpeed: the only room that imports it.

Owns process groups, the resolved DeepSpeed configuration, the engine, activation checkpointing and
checkpoints. Must not know objectives, data or the loop.
"""

import os
import sys

if sys.platform == "darwin":
    # Runs use CUDA or the CPU; DeepSpeed would choose Apple's GPU by itself.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
