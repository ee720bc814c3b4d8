"""The order of samples: a pure function of (shard sizes, seed, epoch).

    1. permute the shards of the epoch
    2. cut the resulting list of samples into `num_streams` equal contiguous ranges
    3. shuffle each stream within windows of a few shards' worth of samples

Epoch position p is item p // num_streams of stream p % num_streams, so consecutive positions mix
all streams while each stream reads almost sequentially. Run position P is position P % n of epoch
P // n; step k takes run positions k*V .. (k+1)*V-1, so one integer, independent of ranks and
workers, is the state of a run. Planning costs O(shards).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from arvideo_ds.errors import UserError
from arvideo_ds.planning.plan import RunPlan
from arvideo_ds.randomness import shard_generator, window_generator

# One window per stream is in use; 2,048 of 40,000 samples are 330 MB.
_CACHED_WINDOWS = 2048
_CACHED_EPOCHS = 2
# Shards per lookup.
_PART = 2**16


@dataclass(frozen=True)
class Place:
    """Epoch, position in it, shard number, and index in the shard of a run position."""

    epoch: int
    position: int
    shard: int
    member: int


class SampleOrder:
    """Order over shards of the given sizes. window_shards: size of the shuffled windows, in average
    shards. Errors: `UserError` without samples."""

    def __init__(
        self,
        shard_sizes: Sequence[int] | np.ndarray,
        *,
        seed: int,
        num_streams: int,
        window_shards: int,
    ) -> None:
        self._sizes = np.asarray(shard_sizes)
        self.num_samples = int(self._sizes.sum(dtype=np.int64))
        if self.num_samples < 1:
            raise UserError("the shards contain no samples.")
        self._seed = seed
        self._num_streams = num_streams
        mean_size = -(-self.num_samples // len(self._sizes))
        self._window = max(1, window_shards * mean_size)

    def place(self, run_position: int) -> Place:
        """Where the sample of a run position is."""
        epoch, position = divmod(run_position, self.num_samples)
        item, stream = divmod(position, self._num_streams)
        start, stop = self._stream_range(stream)
        window, offset = divmod(item, self._window)
        window_start = start + window * self._window
        size = min(self._window, stop - window_start)
        listed = window_start + int(self._window_shuffle(epoch, stream, window, size)[offset])
        shards, ends = self._epoch_shards(epoch)
        slot = int(np.searchsorted(ends, listed, side="right"))
        shard = int(shards[slot])
        return Place(epoch, position, shard, listed - int(ends[slot] - self._sizes[shard]))

    def _stream_range(self, stream: int) -> tuple[int, int]:
        """Start and stop in the epoch's list; the first n % num_streams have one item more."""
        length, longer = divmod(self.num_samples, self._num_streams)
        start = stream * length + min(stream, longer)
        return start, start + length + (stream < longer)

    @functools.lru_cache(maxsize=_CACHED_EPOCHS)  # noqa: B019  one order per process
    def _epoch_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's shard sequence and the list position where each ends."""
        # The draws of `permutation` in half its memory; numpy would index with 64 bits each.
        shards = np.arange(len(self._sizes), dtype=np.uint32)
        shard_generator(self._seed, epoch).shuffle(shards)
        ends = np.empty(len(shards), dtype=np.int64)
        for start in range(0, len(shards), _PART):
            part = slice(start, start + _PART)
            ends[part] = self._sizes[shards[part]]
        return shards, np.cumsum(ends, out=ends)

    @functools.lru_cache(maxsize=_CACHED_WINDOWS)  # noqa: B019
    def _window_shuffle(self, epoch: int, stream: int, window: int, size: int) -> np.ndarray:
        shuffle = window_generator(self._seed, epoch, stream, window).permutation(size)
        return shuffle.astype(np.uint32)


def rank_positions(plan: RunPlan, *, rank: int, first_step: int) -> Iterator[list[int]]:
    """Run positions of one rank, a list per micro-batch, from `first_step` to the end. Of a step's
    positions k*V .. (k+1)*V-1 (V videos per step), a data rank takes those congruent to it modulo
    the number of data ranks; the ranks of a sequence group are one data rank."""
    per_rank = plan.videos_per_step // plan.data_ranks
    per_micro_batch = plan.micro_batch // plan.repeats
    for step in range(first_step, plan.steps):
        first = step * plan.videos_per_step + plan.data_rank(rank)
        mine = [first + i * plan.data_ranks for i in range(per_rank)]
        for start in range(0, per_rank, per_micro_batch):
            yield mine[start : start + per_micro_batch]
