"""Which launcher started this process, from its environment alone; needs no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping


def find_launcher(environment: Mapping[str, str] = os.environ) -> str:
    """ "deepspeed", "torchrun", "srun" or "python"."""
    if "WORLD_SIZE" in environment and "RANK" in environment:
        return "torchrun" if "TORCHELASTIC_RUN_ID" in environment else "deepspeed"
    # SLURM_STEP_ID is there in srun's tasks, not in the batch script itself.
    if "SLURM_STEP_ID" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1:
        return "srun"
    return "python"


def planned_world_size(environment: Mapping[str, str] = os.environ) -> int:
    """Number of ranks that the launcher will give, before any process group is made."""
    variable = {"python": None, "srun": "SLURM_NTASKS"}.get(
        find_launcher(environment), "WORLD_SIZE"
    )
    return 1 if variable is None else int(environment[variable])
