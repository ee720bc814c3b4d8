"""What every data worker is working on right now, in memory that all of them share.

A worker that hangs in native code or dies can say nothing any more; this says it for it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils.data import get_worker_info

_IDLE = -1


class Watch:
    """One line a worker: the run position in work and since when."""

    def __init__(self, num_workers: int) -> None:
        self._lines = torch.full((max(1, num_workers), 2), _IDLE, dtype=torch.int64)
        self._lines.share_memory_()

    @contextmanager
    def on(self, position: int) -> Iterator[None]:
        """Around the work on one position; called in the worker."""
        worker = get_worker_info()
        line = self._lines[0 if worker is None else worker.id]
        line[1] = time.monotonic_ns()
        line[0] = position
        yield
        line[0] = _IDLE

    def position(self, worker: int) -> int | None:
        """What a worker was on when it was last heard of."""
        position = int(self._lines[worker, 0])
        return None if position == _IDLE else position

    def longest(self) -> int | None:
        """The worker that has been on one position for the longest time."""
        busy = [w for w in range(len(self._lines)) if self.position(w) is not None]
        return min(busy, key=lambda worker: int(self._lines[worker, 1]), default=None)
