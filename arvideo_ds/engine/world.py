"""Starting alike under `deepspeed`, `torchrun`, `srun` and plain `python`, on CUDA and CPU."""

from __future__ import annotations

import os
import socket
import subprocess
from dataclasses import dataclass
from datetime import timedelta

import deepspeed
import torch

from arvideo_ds.engine.launcher import find_launcher
from arvideo_ds.errors import UserError

_TIMEOUT = timedelta(minutes=30)
# Slurm jobs on one node must not meet; ports of a job's restarts neither.
_FIRST_PORT, _PORTS = 20_000, 20_000


@dataclass(frozen=True)
class World:
    """This process among all: rank 0..size-1, its place on the host, and its device."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    launcher: str

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start_world() -> World:
    """Make the default process group (NCCL on CUDA, gloo on CPU). Every rank calls it, once."""
    launcher = find_launcher()
    _set_environment(launcher)
    local_rank = int(os.environ["LOCAL_RANK"])
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    device = _device(local_rank)
    if device.type == "cpu":
        # Ranks of one host share its cores; torch would give each of them all.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    _init_process_group(device)
    return World(
        rank=int(os.environ["RANK"]),
        size=int(os.environ["WORLD_SIZE"]),
        local_rank=local_rank,
        local_size=local_size,
        device=device,
        launcher=launcher,
    )


def _init_process_group(device: torch.device) -> None:
    if device.type == "cpu":
        # DeepSpeed would compile a shared-memory all-reduce at first use: minutes, a compiler,
        # and a lock file that a killed run leaves behind. gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, timeout=_TIMEOUT, verbose=False)


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available() or os.environ.get("DS_ACCELERATOR") == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise UserError(
            f"rank {os.environ['RANK']} is process {local_rank} of this host, which shows {count} "
            "GPU(s). Start as many processes as there are GPUs."
        )
    # srun may show each task its own GPU only; then that is number 0.
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _set_environment(launcher: str) -> None:
    if launcher == "srun":
        job = int(os.environ["SLURM_JOB_ID"]) + int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        tasks_per_node = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1")
        shown_one = torch.cuda.device_count() == 1
        values = {
            "RANK": os.environ["SLURM_PROCID"],
            "WORLD_SIZE": os.environ["SLURM_NTASKS"],
            "LOCAL_RANK": "0" if shown_one else os.environ["SLURM_LOCALID"],
            "LOCAL_WORLD_SIZE": tasks_per_node.partition("(")[0].partition(",")[0],
            "MASTER_ADDR": _first_slurm_host(),
            "MASTER_PORT": str(_FIRST_PORT + job % _PORTS),
        }
    elif launcher == "python":
        values = {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
        }
    else:
        return
    for name, value in values.items():
        if launcher == "python":
            os.environ[name] = value
        else:
            os.environ.setdefault(name, value)


def _first_slurm_host() -> str:
    hosts = os.environ["SLURM_STEP_NODELIST"]
    command = ["scontrol", "show", "hostnames", hosts]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"cannot tell the first host of {hosts} ({error}); export MASTER_ADDR yourself."
        ) from None
    return listed.split()[0]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
