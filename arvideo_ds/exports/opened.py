"""An exported model, opened from its folder as its users will open it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from arvideo_ds.exports.source import Outputs
from arvideo_ds.files.tensors import save_tensors


@dataclass(frozen=True)
class Opened:
    """run: clips B T H W 3, uint8, to outputs. how_to: lines of Python. remarks: for the card."""

    run: Callable[[Tensor], Outputs]
    how_to: str
    versions: dict[str, str]
    remarks: list[str] = field(default_factory=list)
    # First lines of the card, which model hubs read.
    tags: dict[str, str] = field(default_factory=dict)


def save_weights(state: dict[str, Tensor], path: Path) -> None:
    """As safetensors; parts of one tensor become tensors of their own."""
    whole = {
        name: value.detach().clone(memory_format=torch.contiguous_format)
        for name, value in state.items()
    }
    # safetensors lets nobody but the writer read; exports are passed on.
    path.touch()
    mode = path.stat().st_mode
    save_tensors(whole, path)
    path.chmod(mode)


def versions(*packages: str) -> dict[str, str]:
    return {package: metadata.version(package) for package in ("torch", *packages)}
