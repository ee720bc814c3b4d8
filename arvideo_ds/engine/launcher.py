"""Which launcher started this process, from its environment alone; importable without torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

# Below Linux's ports of outgoing connections (32768 and up), ten per job: jobs on one node, and
# restarts and steps of one job, have different ports.
_FIRST_PORT, _PORTS = 12_000, 20_000


def find_launcher(environment: Mapping[str, str] = os.environ) -> str:
    """ "deepspeed", "torchrun", "srun" or "python"."""
    if "WORLD_SIZE" in environment and "RANK" in environment:
        return "torchrun" if "TORCHELASTIC_RUN_ID" in environment else "deepspeed"
    # Not SLURM_NTASKS, which batch scripts and interactive shells have as well.
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return "srun"
    return "python"


def planned_world_size(environment: Mapping[str, str] = os.environ) -> int:
    """Number of ranks that the launcher starts, before any process group exists."""
    launcher = find_launcher(environment)
    if launcher == "python":
        return 1
    return int(environment["SLURM_STEP_NUM_TASKS" if launcher == "srun" else "WORLD_SIZE"])


def uses_gpu() -> bool:
    """Whether this process computes on CUDA. Imports torch."""
    import torch

    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"


def slurm_ranks(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables of torch's process group for a task of srun; an exported MASTER_* overrides one."""
    node = int(environment["SLURM_NODEID"])
    job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
    restart = int(environment.get("SLURM_RESTART_COUNT", "0"))
    port = _FIRST_PORT + (10 * job + (restart + step) % 10) % _PORTS
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])[node]),
        "MASTER_ADDR": environment.get("MASTER_ADDR")
        or first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(port),
    }


def tasks_per_node(listed: str) -> list[int]:
    """ "2(x3),1" -> [2, 2, 2, 1]: Slurm's text for nodes with different numbers of tasks."""
    runs = re.findall(r"(\d+)(?:\(x(\d+)\))?", listed)
    return [int(tasks) for tasks, nodes in runs for _ in range(int(nodes or 1))]


def first_host(listed: str) -> str:
    """ "rack[2-3]node[01-04,7],gpu5" -> "rack2node01". Containers often have no scontrol."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", listed)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group() if first else listed)
