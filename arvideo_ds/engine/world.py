"""Ranks and devices under `deepspeed`, `torchrun`, `srun` and plain `python`, on CUDA and CPU."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from arvideo_ds.engine.launcher import find_launcher, slurm_ranks, uses_gpu
from arvideo_ds.errors import UserError
from arvideo_ds.host import available_cores

_TIMEOUT = timedelta(minutes=30)
_RESOLVE_TRIES, _RESOLVE_PAUSE_S = 3, 2.0


@dataclass(frozen=True)
class World:
    """A process: rank 0..size-1, local rank, device, and its number of CPU cores."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    launcher: str
    cores: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start_world(recorder: Path | None = None) -> World:
    """Make the default process group (NCCL on CUDA, gloo on CPU). Every rank calls it, once.

    recorder: folder in which torch's flight recorder writes, when a collective of NCCL times out,
    the last ones of each rank. Errors: `UserError` when there are more ranks than GPUs or the ranks
    cannot meet.
    """
    world = find_world()
    if world.device.type == "cpu":
        # Ranks of one host share its cores; torch would use all of them in each.
        torch.set_num_threads(world.cores)
    if world.size > 1:
        # Before they meet: in a start that hangs, a missing line names the missing rank.
        print(_description(world), flush=True)
    if recorder is not None:
        recorder.mkdir(parents=True, exist_ok=True)
        os.environ.update(_recording(recorder))
    _init_process_group(world)
    return world


def _recording(folder: Path) -> dict[str, str]:
    """Variables of torch's flight recorder, which it reads when the process group starts."""
    return {
        "TORCH_FR_BUFFER_SIZE": os.environ.get("TORCH_FR_BUFFER_SIZE", "2000"),
        "TORCH_FR_DUMP_TEMP_FILE": str(folder.resolve() / "rank_"),
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        # torch's default; with torchrun's 1, aborted collectives would be missing in the records.
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
    }


def find_world() -> World:
    """Rank and device of this process, without a process group.

    Errors: `UserError` when there are more ranks than GPUs.
    """
    launcher = find_launcher()
    if launcher == "srun":
        os.environ.update(slurm_ranks())
    elif launcher == "python":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
        os.environ.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1"
        )
    local_rank = int(os.environ["LOCAL_RANK"])
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    return World(
        rank=int(os.environ["RANK"]),
        size=int(os.environ["WORLD_SIZE"]),
        local_rank=local_rank,
        local_size=local_size,
        device=_device(local_rank, local_size, launcher),
        launcher=launcher,
        cores=_cores(local_size),
    )


def _description(world: World) -> str:
    device = str(world.device)
    if world.device.type == "cuda" and "CUDA_VISIBLE_DEVICES" in os.environ:
        device += f" of CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']}"
    return (
        f"rank {world.rank} of {world.size}: process {world.local_rank} of {world.local_size} on "
        f"{socket.gethostname()}, {device}, {world.cores} core(s), meeting at "
        f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    )


def _init_process_group(world: World) -> None:
    if world.device.type == "cpu":
        # DeepSpeed would compile a shared-memory all-reduce at first use, which takes minutes and
        # leaves a lock file behind in a killed run. gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    _require_resolvable(address)
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    try:
        deepspeed.init_distributed(dist_backend=backend, timeout=_TIMEOUT, verbose=False)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"rank {world.rank} on {socket.gethostname()} could not meet the others at "
            f"{address}:{port} ({reason}). If another program uses the port, export MASTER_PORT; "
            "if the address cannot be reached, export MASTER_ADDR; arvideo doctor, started in the "
            "same way, reports more."
        ) from None


def _require_resolvable(host: str) -> None:
    """torch would retry for half an hour."""
    reason = ""
    for number in range(_RESOLVE_TRIES):
        if number:
            time.sleep(_RESOLVE_PAUSE_S)
        try:
            socket.getaddrinfo(host, None)
            return
        except socket.gaierror as error:
            reason = str(error)
    raise UserError(
        f"{socket.gethostname()} cannot resolve {host}, the host of rank 0 ({reason}). Export "
        "MASTER_ADDR with an address that every node reaches."
    )


def use_tf32(device: torch.device, allowed: bool) -> None:
    """Whether a GPU rounds the inputs of fp32 matrix products to TF32 from now on."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if allowed else "highest")


def emulates_bf16(device: torch.device) -> bool:
    """Whether this is a CPU without AVX512 (x86) or bf16 (Arm) instructions, on which oneDNN does
    not multiply matrices in bf16: torch then takes about 70 times as long as in fp32."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _cores(local_size: int) -> int:
    """CPU cores that Slurm binds to this rank, or its share of the host's."""
    seen = len(available_cores())
    bound = seen < int(os.environ.get("SLURM_CPUS_ON_NODE", "0"))
    return seen if bound else max(1, seen // local_size)


def _device(local_rank: int, local_size: int, launcher: str) -> torch.device:
    if not uses_gpu():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if launcher == "srun" and count == 1:
        # Slurm may show each task one GPU only (--gpus-per-task), as number 0.
        gpus_of_tasks = int(os.environ.get("SLURM_GPUS_ON_NODE", local_size))
        local_rank = 0 if gpus_of_tasks >= local_size else local_rank
    if local_rank >= count:
        raise UserError(
            f"rank {os.environ['RANK']} is process {local_rank} of {socket.gethostname()}, which "
            f"shows {count} GPU(s). Start as many processes on a host as it has GPUs."
        )
    # DeepSpeed reads the number of the GPU here.
    os.environ["LOCAL_RANK"] = str(local_rank)
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
