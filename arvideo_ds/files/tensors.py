"""Final weights as safetensors with the hash of their tensors.

The header's metadata has a SHA-256 over names, types, shapes and values, which every reader of this
package compares.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from arvideo_ds.errors import UserError

_HASH = "sha256"


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors (CPU or device, none sharing memory) with their hash."""
    # One entry: safetensors writes several in random order, but equal weights must be equal files.
    save_file(dict(tensors), path, metadata={_HASH: _hash_of(tensors)})


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name, on the CPU, compared with the file's hash if it has one.

    Errors: `UserError` if they differ; those of safetensors and of the file system.
    """
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        expected = (file.metadata() or {}).get(_HASH)
    if expected is not None and expected != _hash_of(tensors):
        raise UserError(
            f"{path} is damaged: its tensors do not match the SHA-256 in its header. Copy it "
            "again; in a run's own folder, give the training command again: it writes the last "
            "weights and their average anew from the last checkpoint."
        )
    return tensors


def _hash_of(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        values = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(values.numpy().data)
    return digest.hexdigest()
