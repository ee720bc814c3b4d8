"""DeepSpeed, and everything that knows of it: the only room that imports it.

Owns process groups, the resolved DeepSpeed configuration, the engine, activation checkpointing,
checkpoints on disk and gathered weights. Must not know recipes' objectives, data or the loop.
`resolve` needs no DeepSpeed, so a dry run and the tests of the JSON files are instant.
"""

import os
import sys

if sys.platform == "darwin":
    # DeepSpeed would choose Apple's GPU by itself, and a run here is on CUDA or the CPU.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
