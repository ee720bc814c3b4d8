"""The order of samples: a pure function of (shard sizes, seed, epoch).

    1. permute the shards of the epoch
    2. cut the resulting list of samples into `num_streams` equal contiguous ranges
    3. shuffle each stream within windows of a few shards' worth of samples

Epoch position p is item p // num_streams of stream p % num_streams, so consecutive positions mix
all streams while each stream reads almost sequentially. Run position P is position P % n of epoch
P // n; step k takes run positions k*V .. (k+1)*V-1, so one integer, independent of ranks and
workers, is the state of a run; phases with another V continue where the last one ended. Planning
costs O(shards).

In a mixture, `SourceOrder` assigns each run position to a source, and every source has an order of
its own: the n-th position of a source is run position n of its `SampleOrder`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from arvideo_ds.errors import UserError
from arvideo_ds.planning.plan import RunPlan
from arvideo_ds.randomness import rank_generator, shard_generator, window_generator

# One window per stream is in use; 2,048 of 40,000 samples are 330 MB.
_CACHED_WINDOWS = 2048
_CACHED_EPOCHS = 2
_CACHES = ("_epoch_shards", "_window_shuffle")
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
        self._make_caches()

    def _make_caches(self) -> None:
        # Per order: the sources of a mixture do not displace each other's.
        self._epoch_shards = functools.lru_cache(_CACHED_EPOCHS)(self._draw_shards)
        self._window_shuffle = functools.lru_cache(_CACHED_WINDOWS)(self._draw_window)

    def __getstate__(self) -> dict[str, Any]:
        """Without the caches, for data workers that do not start by a fork."""
        return {name: value for name, value in vars(self).items() if name not in _CACHES}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._make_caches()

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

    def _draw_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's shard sequence and the list position where each ends."""
        # The draws of `permutation` in half its memory; numpy would index with 64 bits each.
        shards = np.arange(len(self._sizes), dtype=np.uint32)
        shard_generator(self._seed, epoch).shuffle(shards)
        ends = np.empty(len(shards), dtype=np.int64)
        for start in range(0, len(shards), _PART):
            part = slice(start, start + _PART)
            ends[part] = self._sizes[shards[part]]
        return shards, np.cumsum(ends, out=ends)

    def _draw_window(self, epoch: int, stream: int, window: int, size: int) -> np.ndarray:
        shuffle = window_generator(self._seed, epoch, stream, window).permutation(size)
        return shuffle.astype(np.uint32)


class SourceOrder:
    """Which source of a mixture a run position belongs to, and how many earlier ones do: a function
    of (weights, position), in constant time.

    After any number of positions, the count of a source is its share of them, rounded down or up.
    So the c-th video of a source with n of every N positions has a first and a last position,
    floor(c N / n) and ceil((c + 1) N / n) - 1, and each position goes to the source, of those whose
    first has come, with the earliest last; ties by the order of sources. Source: Tijdeman, The
    chairman assignment problem, 1980; earliest deadline first meets all of them. weights: whole,
    without a common divisor; after their sum N, the sequence repeats.
    """

    def __init__(self, weights: Sequence[int]) -> None:
        self._weights = np.array(weights)
        period, counts = sum(weights), [0] * len(weights)
        self._sources = np.empty(period, dtype=np.int64)
        # Positions of the same source before each, in the period.
        self._before = np.empty(period, dtype=np.int64)
        for position in range(period):
            come = [s for s, w in enumerate(weights) if counts[s] * period // w <= position]
            source = min(come, key=lambda s: -(-(counts[s] + 1) * period // weights[s]))
            self._sources[position], self._before[position] = source, counts[source]
            counts[source] += 1

    def place(self, run_position: int) -> tuple[int, int]:
        """The source, and the position among its own."""
        periods, position = divmod(run_position, len(self._sources))
        source = int(self._sources[position])
        return source, periods * int(self._weights[source]) + int(self._before[position])

    def counts(self, run_position: int) -> list[int]:
        """Number of positions of each source before this one."""
        periods, position = divmod(run_position, len(self._sources))
        part = np.bincount(self._sources[:position], minlength=len(self._weights))
        return [int(n) for n in periods * self._weights + part]


def rank_positions(plan: RunPlan, *, rank: int, first_step: int) -> Iterator[list[int]]:
    """Run positions of one rank, a list per micro-batch, from `first_step` to the end of its phase.
    Of a step's V positions (V videos per step), a data rank takes those congruent to it modulo the
    number of data ranks; the ranks of a sequence group are one data rank. In a mixture, the
    positions of a step are shuffled first: every rank gets videos of every source, also where the
    sequence of sources and the ranks have the same rhythm."""
    part = plan.part_at(first_step)
    plan = part.plan
    per_rank = plan.videos_per_step // plan.data_ranks
    per_micro_batch = plan.micro_batch // plan.repeats
    for step in range(first_step, part.end_step):
        first, order = part.videos_before(step), range(plan.videos_per_step)
        if plan.sources:
            order = rank_generator(step).permutation(plan.videos_per_step).tolist()
        mine = [first + position for position in order[plan.data_rank(rank) :: plan.data_ranks]]
        for start in range(0, per_rank, per_micro_batch):
            yield mine[start : start + per_micro_batch]
