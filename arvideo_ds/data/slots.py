"""Memory for the clips of batches, shared with the data workers and used again.

Writing to new pages of shared memory takes several times as long as copying the clips. A slot is
used again when no tensor refers to it any more, so that batches may be kept as long as needed.
"""

from __future__ import annotations

import itertools
import math
import sys
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_numbers = itertools.count()
_opened: weakref.WeakValueDictionary[int, Slots] = weakref.WeakValueDictionary()


class Slots:
    """`count` slots of `num_bytes`. The trainer takes and opens them, a worker fills them."""

    def __init__(self, count: int, num_bytes: int) -> None:
        self._tensors = [_shared(num_bytes) for _ in range(count)]
        # A tensor made of an array refers to the array, as do its views.
        self._arrays = [tensor.numpy() for tensor in self._tensors]
        self._references = sys.getrefcount(self._arrays[0])
        self._loading: set[int] = set()
        self._number = next(_numbers)
        _opened[self._number] = self

    def __getstate__(self) -> dict[str, Any]:
        """What a worker needs that does not start by a fork."""
        return {"_tensors": self._tensors, "_number": self._number}

    def take(self) -> int | None:
        """A slot for the next batch; None while all are in use."""
        for number in range(len(self._arrays)):
            used = sys.getrefcount(self._arrays[number]) > self._references
            if not used and number not in self._loading:
                self._loading.add(number)
                return number
        return None

    def memory(self, slot: int) -> Tensor:
        """All bytes of a slot, in the worker."""
        return self._tensors[slot]

    def filled(self, slot: int, clips: Tensor) -> FilledSlot:
        """What the worker sends to the trainer instead of these clips, at the slot's start."""
        return FilledSlot(self._number, slot, tuple(clips.shape))

    def open(self, slot: int, shape: tuple[int, ...]) -> Tensor:
        """The clips in a slot, in the trainer."""
        clips = torch.from_numpy(self._arrays[slot][: math.prod(shape)]).view(shape)
        self._loading.discard(slot)
        return clips


@dataclass(frozen=True)
class FilledSlot:
    """Becomes the clips on its way from the worker to the trainer."""

    slots: int
    slot: int
    shape: tuple[int, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        return _open, (self.slots, self.slot, self.shape)


def _open(slots: int, slot: int, shape: tuple[int, ...]) -> Tensor:
    return _opened[slots].open(slot, shape)


def _shared(num_bytes: int) -> Tensor:
    # `share_memory_` would write to all pages.
    storage = torch.UntypedStorage._new_shared(num_bytes, device="cpu")
    return torch.empty(0, dtype=torch.uint8).set_(storage)
