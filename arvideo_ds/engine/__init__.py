"""DeepSpeed: the only room that imports it.

Owns process groups, the resolved DeepSpeed configuration, the engine, activation checkpointing and
checkpoints. Must not know objectives, data or the loop.
"""

import logging
import os
import sys

# A run's header names its device; DeepSpeed would add a warning to it in every command.
logging.getLogger("DeepSpeed").addFilter(
    lambda record: not record.getMessage().startswith("Setting accelerator to CPU")
)
if sys.platform == "darwin":
    # Runs use CUDA or the CPU; DeepSpeed would choose Apple's GPU by itself.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
