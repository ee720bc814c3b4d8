"""The device, a matrix product on it, and an all-reduce over the ranks."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from arvideo_ds.doctor.report import Finding
from arvideo_ds.engine.world import emulates_bf16

_SIDE = {"cpu": 1024, "cuda": 8192}
# The first warms up.
_TRIES = 11
_MESSAGE_MIB = {"cpu": 16, "cuda": 256}


def check_gpus() -> Finding:
    """The GPUs that torch sees, compared with those of the machine."""
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        properties = torch.cuda.get_device_properties(0)
        says = f"{count} x {properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        return Finding("GPUs", "ok", f"{says}; torch built for CUDA {torch.version.cuda}")
    if shutil.which("nvidia-smi"):
        says = f"nvidia-smi is there, but torch {torch.__version__} sees no GPU"
        fix = (
            f"compare the driver's CUDA version (nvidia-smi) with torch's ({torch.version.cuda}); "
        )
        fix += "in a Slurm job ask for GPUs; in a container pass them on"
        return Finding("GPUs", "problem", says, fix)
    says = "none; everything runs on the CPU"
    if emulates_bf16(torch.device("cpu")):
        fix = "use train.precision=fp32"
        return Finding("GPUs", "warning", f"{says}, which computes bf16 in software", fix)
    return Finding("GPUs", "ok", says)


def matmul_gflops(device: torch.device, dtype: torch.dtype | None = None) -> float:
    """GFLOP/s of a product of random matrices, best of ten.

    dtype: by default fp32 on a CPU, bf16 on a GPU.
    """
    side = _SIDE[device.type]
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    # Equal values take less power, so a GPU would multiply them at a higher clock.
    matrix = torch.randn(side, side, dtype=dtype, device=device)
    best_s = min(_seconds(lambda: torch.mm(matrix, matrix), device) for _ in range(_TRIES))
    return 2 * side**3 / best_s / 1e9


def check_matmul(gflops: list[float], device: torch.device) -> Finding:
    """gflops: of every rank; a much slower one delays all others."""
    slowest, fastest = min(gflops), max(gflops)
    says = f"{slowest:.0f} GFLOP/s on {device.type}"
    if len(gflops) > 1:
        says = f"{slowest:.0f} (rank {gflops.index(slowest)}) to {fastest:.0f} GFLOP/s a rank"
    if slowest < fastest / 2:
        fix = "look at that rank's host: other programs, cores, clocks; or leave it out (--exclude)"
        return Finding("matmul", "warning", says, fix)
    return Finding("matmul", "ok", says)


def check_all_reduce(device: torch.device) -> Finding:
    """Time a sum over all n ranks and check the result. Collective. Bus bandwidth: 2 (n - 1) / n x
    bytes / time. Source: nccl-tests, PERFORMANCE.md."""
    size = dist.get_world_size()
    message = torch.empty(_MESSAGE_MIB[device.type] * 2**20 // 4, device=device)
    best_s = float("inf")
    for _ in range(_TRIES):
        message.fill_(dist.get_rank())
        dist.barrier()
        best_s = min(best_s, _seconds(lambda: dist.all_reduce(message), device))
    right = bool((message == size * (size - 1) / 2).all())
    bus_gb_s = 2 * (size - 1) / size * message.nbytes / best_s / 1e9
    says = (
        f"{message.nbytes / 2**20:.0f} MiB over {size} ranks by {dist.get_backend()} in "
        f"{best_s * 1e3:.1f} ms: {bus_gb_s:.2f} GB/s of bus bandwidth"
    )
    if not right:
        return Finding("all-reduce", "problem", f"the sum is wrong; {says}", "replace the node")
    return Finding("all-reduce", "ok", says)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
