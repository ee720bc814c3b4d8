"""The values of a checkpoint, by parameter and range; needs neither an engine nor its ranks.

A checkpoint holds one safetensors file per rank that saved (no pickle, so nothing in it can run).
A file's tensors are flat and named `<parameter>/<start>/<kind>`; its header says how long each
parameter is. Kinds are "weight" (fp32), the optimiser's moments, and "average" where one is kept.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from arvideo_ds.errors import UserError

_FILES = "rank-*.safetensors"
_SHAPES = "shapes"


class _Stored(NamedTuple):
    start: int
    stop: int
    file: Path
    key: str


def file_of_rank(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.safetensors"


def key_of(parameter: str, start: int, kind: str) -> str:
    return f"{parameter}/{start}/{kind}"


def header(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Metadata of a file: the shape of every parameter of the model."""
    return {_SHAPES: json.dumps({name: list(shape) for name, shape in shapes.items()})}


class SavedState:
    """Reads ranges of any parameter's weight or moments, from whichever files hold them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._stored: dict[tuple[str, str], list[_Stored]] = defaultdict(list)
        self._files: dict[Path, Any] = {}
        for file in sorted(folder.glob(_FILES)):
            self._index(file)
        self.kinds = sorted({kind for _, kind in self._stored})

    def read(self, parameter: str, kind: str, start: int, length: int) -> Tensor:
        """Values start..start+length of the flattened parameter, fp32, on the CPU.

        Errors: `UserError` where the checkpoint does not hold them.
        """
        out, stop, done = torch.empty(length), start + length, 0
        for piece in self._stored.get((parameter, kind), []):
            first, last = max(start, piece.start), min(stop, piece.stop)
            if first < last:
                values = self._files[piece.file].get_slice(piece.key)
                inside = slice(first - piece.start, last - piece.start)
                out[first - start : last - start] = values[inside]
                done += last - first
        if done != length:
            raise UserError(
                f"checkpoint {self.folder} holds {done} of {length} values of {kind} of "
                f"{parameter}: it is of another model, or files are missing."
            )
        return out

    def weights(self, prefix: str, kind: str = "weight") -> dict[str, Tensor]:
        """All fp32 weights (or their averages) below a prefix, whole, named without it."""
        return {
            name.removeprefix(prefix): self.read(name, kind, 0, _count(shape)).view(shape)
            for name, shape in self.shapes.items()
            if name.startswith(prefix)
        }

    def _index(self, file: Path) -> None:
        try:
            # Mapped, not read; closed with this object.
            self._files[file] = opened = safe_open(file, framework="pt")
            shapes = json.loads((opened.metadata() or {})[_SHAPES])
            self.shapes.update({name: tuple(shape) for name, shape in shapes.items()})
            for key in opened.keys():  # noqa: SIM118  no mapping
                parameter, start, kind = key.rsplit("/", 2)
                stop = int(start) + opened.get_slice(key).get_shape()[0]
                self._stored[parameter, kind].append(_Stored(int(start), stop, file, key))
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise UserError(f"{file} is no part of a checkpoint: {error}") from None


def _count(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
