"""Which launcher started this process, from its environment alone; needs no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

# Below the ports that Linux hands out for outgoing connections (32768 and up), ten for each job:
# neither jobs on one node nor the restarts and steps of one job meet.
_FIRST_PORT, _PORTS = 12_000, 20_000


def find_launcher(environment: Mapping[str, str] = os.environ) -> str:
    """ "deepspeed", "torchrun", "srun" or "python"."""
    if "WORLD_SIZE" in environment and "RANK" in environment:
        return "torchrun" if "TORCHELASTIC_RUN_ID" in environment else "deepspeed"
    # Not SLURM_NTASKS: batch scripts and interactive shells have that of the job, too.
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return "srun"
    return "python"


def planned_world_size(environment: Mapping[str, str] = os.environ) -> int:
    """Number of ranks that the launcher will give, before any process group is made."""
    variable = {"python": None, "srun": "SLURM_STEP_NUM_TASKS"}.get(
        find_launcher(environment), "WORLD_SIZE"
    )
    return 1 if variable is None else int(environment[variable])


def slurm_ranks(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables of torch's process groups for one task of srun.

    Who the task is, Slurm says; where the ranks meet, an exported MASTER_ADDR or MASTER_PORT may.
    """
    node = int(environment["SLURM_NODEID"])
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])[node]),
        "MASTER_ADDR": environment.get("MASTER_ADDR")
        or first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(_port(environment)),
    }


def tasks_per_node(listed: str) -> list[int]:
    """ "2(x3),1" -> [2, 2, 2, 1]: what Slurm writes for nodes with different numbers of tasks."""
    counts = []
    for tasks, nodes in re.findall(r"(\d+)(?:\(x(\d+)\))?", listed):
        counts += [int(tasks)] * int(nodes or 1)
    return counts


def first_host(listed: str) -> str:
    """ "rack[2-3]node[01-04,7],gpu5" -> "rack2node01". Containers often have no scontrol to ask."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", listed)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group() if first else listed)


def _port(environment: Mapping[str, str]) -> int:
    job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
    restart = int(environment.get("SLURM_RESTART_COUNT", "0"))
    return _FIRST_PORT + (10 * job + (restart + step) % 10) % _PORTS
