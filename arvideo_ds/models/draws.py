"""Random draws on the device, as a pure function of one integer per clip.

Each clip has a key (arvideo_ds.randomness.draw_key). A counter-based hash expands it into as many
numbers as the model needs, equal on every device, without generator state.

B clips.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# SplitMix64 (Steele, Lea, Flood 2014), its unsigned constants written as signed 64-bit integers.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64
# Bits of a uniform number; with a half added it is exact in float32.
_UNIFORM = 23


def random_ranks(keys: Tensor, purpose: int, shape: tuple[int, ...]) -> Tensor:
    """A uniform random permutation of the last axis, for every clip and leading index.

    keys: int64, B. purpose: separates the draws of one clip. Returns int64, B x shape; each row of
    the last axis is a permutation of 0..n-1, all rows independent.
    """
    return _bits(keys, purpose, shape).argsort(dim=-1, stable=True)


def random_subsets(keys: Tensor, purpose: int, num_sets: int, size: int, picked: int) -> Tensor:
    """`picked` of `size` items of each set, uniform without replacement: int64, B x sets x picked.

    Sorted within a set, for memory access.
    """
    if picked == size:
        return torch.arange(size, device=keys.device).expand(len(keys), num_sets, size)
    ranks = random_ranks(keys, purpose, (num_sets, size))
    return ranks[..., :picked].sort(dim=-1).values


def random_normals(keys: Tensor, purpose: int, shape: tuple[int, ...], *, start: int = 0) -> Tensor:
    """Independent standard normal numbers for every clip: float32, B x shape.

    start: offset in the draw, to make a long one in parts. Devices agree up to rounding.
    """
    bits = _bits(keys, purpose, shape, start=start)
    radius, turn = (_uniform(_shift_right(bits, by)) for by in (64 - _UNIFORM, 0))
    return radius.log_().mul_(-2).sqrt_() * turn.mul_(math.tau).cos_()


def _uniform(bits: Tensor) -> Tensor:
    """The lowest bits as a number within 0..1, never 0."""
    return ((bits & (1 << _UNIFORM) - 1).float() + 0.5) / (1 << _UNIFORM)


def _bits(keys: Tensor, purpose: int, shape: tuple[int, ...], *, start: int = 0) -> Tensor:
    """Hashed 64-bit numbers of a clip's draw, from index `start`: int64, B x shape."""
    counters = torch.arange(start, start + math.prod(shape), device=keys.device)
    stream = _mix(_mix(keys) + purpose)
    return _mix(stream[:, None] + (counters + 1) * _GOLDEN).view(len(keys), *shape)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser; integer products wrap, as 64-bit arithmetic does."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
