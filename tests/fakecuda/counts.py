"""What programs that run under the imaginary GPU share: its settings, and what it counted."""

from __future__ import annotations

import ctypes
import os
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend

from arvideo_ds.engine import attention, build

_LIBRARY = ctypes.CDLL(os.environ["LD_PRELOAD"])


def prepare() -> None:
    """Switch off what the imaginary GPU cannot do."""
    # cuDNN has no imaginary kernels.
    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    attention.KERNELS.remove(SDPBackend.CUDNN_ATTENTION)
    # DeepSpeed formats weights for its debug log, and formatting selects by values.
    torch.Tensor.__repr__ = lambda _: "imaginary"
    # Copies by kernels move nothing, so objects would not arrive at the one rank.
    dist.all_gather_object = _gather_alone
    # It compares computed weights, which mean nothing here.
    build.require_sound_optimizer = lambda *_, **__: None


def _gather_alone(values: list[Any], value: Any, group: Any = None) -> None:
    values[0] = value


def reset() -> None:
    _LIBRARY.fake_reset()


def events() -> dict[str, int]:
    """How often each event happened since the last reset."""
    with tempfile.NamedTemporaryFile("r") as file:
        _LIBRARY.fake_write(file.name.encode())
        lines = [line.rstrip("\n").split("\t", 1) for line in file]
    return {name: int(times) for times, name in lines}


def summary() -> dict[str, int]:
    """Kernels (matrix products among them) and waits of the host since the last reset."""
    seen = events()

    def total(*prefixes: str) -> int:
        return sum(times for name, times in seen.items() if name.startswith(prefixes))

    return {"kernels": total("kernel:", "gemm"), "waits": total("sync:")}
