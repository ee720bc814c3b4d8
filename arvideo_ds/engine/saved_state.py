"""The values in a checkpoint, by parameter and range; needs neither an engine nor its ranks.

A checkpoint has one safetensors file per rank that saved (no pickle, so loading runs no code).
A file's tensors are flat and named `<parameter>/<start>/<kind>`; its header has the shape of every
parameter. Kinds are "weight" (fp32), the optimiser's moments, and "average" where one is kept.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from arvideo_ds.errors import UserError

_SHAPES = "shapes"


class _Piece(NamedTuple):
    start: int
    stop: int
    file: Any
    key: str


def file_of_rank(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.safetensors"


def write_state(
    path: Path, tensors: Mapping[tuple[str, int, str], Tensor], shapes: Mapping[str, Any]
) -> None:
    """Write a rank's file. tensors: by parameter, start and kind; shapes: of all parameters."""
    named = {f"{name}/{start}/{kind}": values for (name, start, kind), values in tensors.items()}
    save_file(named, path, metadata={_SHAPES: json.dumps(shapes)})


class SavedState:
    """Reads ranges of any parameter's weight, average or moments, whichever files have them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[tuple[str, str], list[_Piece]] = defaultdict(list)
        for path in sorted(folder.glob("rank-*.safetensors")):
            self._index(path)
        self.kinds = sorted({kind for _, kind in self._pieces})

    def read(self, parameter: str, kind: str, start: int, length: int) -> Tensor:
        """Values start..start+length of the flattened parameter, fp32, on the CPU.

        Errors: `UserError` where the checkpoint does not have them.
        """
        out, stop, done = torch.empty(length), start + length, 0
        for piece in self._pieces.get((parameter, kind), []):
            first, last = max(start, piece.start), min(stop, piece.stop)
            if first < last:
                values = piece.file.get_slice(piece.key)
                inside = slice(first - piece.start, last - piece.start)
                out[first - start : last - start] = values[inside]
                done += last - first
        if done != length:
            raise UserError(
                f"checkpoint {self.folder} has {done} of {length} values of {kind} of "
                f"{parameter}: it is of another model, or files are missing."
            )
        return out

    def weights(self, prefix: str, kind: str = "weight") -> dict[str, Tensor]:
        """All fp32 weights (or their averages) below a prefix, whole, named without it.

        The average of a weight that is not trained is the weight.
        """
        averaged = {name for name, saved in self._pieces if saved == kind} or set(self.shapes)
        return {
            name.removeprefix(prefix): self.read(
                name, kind if name in averaged else "weight", 0, math.prod(shape)
            ).view(shape)
            for name, shape in self.shapes.items()
            if name.startswith(prefix)
        }

    def _index(self, path: Path) -> None:
        try:
            # Mapped, not read; closed with this object.
            file: Any = safe_open(path, framework="pt")
            shapes = json.loads((file.metadata() or {})[_SHAPES])
            self.shapes.update({name: tuple(shape) for name, shape in shapes.items()})
            for key in file.keys():  # noqa: SIM118  no mapping
                parameter, start, kind = key.rsplit("/", 2)
                stop = int(start) + file.get_slice(key).get_shape()[0]
                self._pieces[parameter, kind].append(_Piece(int(start), stop, file, key))
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise UserError(f"{path} is not part of a checkpoint: {error}") from None
