"""Random draws as functions of numbers, without hidden state.

A clip is identified by (seed, epoch, position, repeat). `clip_generator` draws its frames, crop and
flip; the device expands `draw_key` to its order, kept tokens and targets. So resumed runs and other
numbers of workers or ranks draw the same.
"""

from __future__ import annotations

import numpy as np

# One constant per purpose: streams that share the other numbers are independent.
_CLIP, _DRAW, _SHARDS, _WINDOW, _SPLIT, _PICK, _SOURCE, _RANKS = range(8)


def _generator(*numbers: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(numbers)))


def clip_generator(seed: int, epoch: int, position: int, repeat: int) -> np.random.Generator:
    """Frame numbers, crop, flip and augmentation of one clip."""
    return _generator(_CLIP, seed, epoch, position, repeat)


def draw_key(seed: int, epoch: int, position: int, repeat: int) -> int:
    """A non-negative 63-bit number from which the model expands the draws of one clip."""
    sequence = np.random.SeedSequence((_DRAW, seed, epoch, position, repeat))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def shard_generator(seed: int, epoch: int) -> np.random.Generator:
    """The permutation of the shards in one epoch."""
    return _generator(_SHARDS, seed, epoch)


def window_generator(seed: int, epoch: int, stream: int, window: int) -> np.random.Generator:
    """The shuffle of one window of one stream in one epoch."""
    return _generator(_WINDOW, seed, epoch, stream, window)


def source_seed(seed: int, source: int) -> int:
    """A non-negative 63-bit seed for the order and the clips of one source of a mixture."""
    sequence = np.random.SeedSequence((_SOURCE, seed, source))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def rank_generator(step: int) -> np.random.Generator:
    """Which videos of a step each rank loads, with a mixture."""
    return _generator(_RANKS, step)


def split_generator(seed: int) -> np.random.Generator:
    """The order in which source videos are assigned to shards."""
    return _generator(_SPLIT, seed)


def pick_generator(seed: int, shard: int) -> np.random.Generator:
    """Which videos of a shard a tool checks or shows."""
    return _generator(_PICK, seed, shard)
