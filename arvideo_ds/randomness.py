"""Every random draw of the project is a function of numbers, never of hidden state.

A clip is named by (seed, epoch, position, repeat). Its frames, crop and flip come from
`clip_generator`; its cluster order, kept tokens and targets are expanded on the device from
`draw_key`. So a resumed run, another number of workers or of ranks draws the same numbers.
"""

from __future__ import annotations

import numpy as np

# One constant per purpose, so that streams which share the other numbers stay independent.
_CLIP, _DRAW, _SHARDS, _WINDOW, _SPLIT, _PICK = range(6)


def _generator(*numbers: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(numbers)))


def clip_generator(seed: int, epoch: int, position: int, repeat: int) -> np.random.Generator:
    """Draws of the data room for one clip: frame indices, crop, flip."""
    return _generator(_CLIP, seed, epoch, position, repeat)


def draw_key(seed: int, epoch: int, position: int, repeat: int) -> int:
    """A non-negative 63-bit number from which the model expands one clip's own draws."""
    sequence = np.random.SeedSequence((_DRAW, seed, epoch, position, repeat))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def shard_generator(seed: int, epoch: int) -> np.random.Generator:
    """The permutation of the shards in one epoch."""
    return _generator(_SHARDS, seed, epoch)


def window_generator(seed: int, epoch: int, stream: int, window: int) -> np.random.Generator:
    """The shuffle of one window of one stream in one epoch."""
    return _generator(_WINDOW, seed, epoch, stream, window)


def split_generator(seed: int) -> np.random.Generator:
    """The order in which source videos are dealt into shards."""
    return _generator(_SPLIT, seed)


def pick_generator(seed: int, shard: int) -> np.random.Generator:
    """Which videos of a shard a tool looks at, to check or to show them."""
    return _generator(_PICK, seed, shard)
