"""Random draws on the device, as a pure function of one integer per clip.

Each clip carries a key (arvideo_ds.randomness.draw_key). A counter-based hash expands it into as
many numbers as the model needs: the same on every device, with no generator state and no
transfer beyond eight bytes per clip.

B clips, n items of one set, m of them picked.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# SplitMix64 (Steele, Lea, Flood 2014), its unsigned constants written as signed 64-bit integers.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def random_ranks(keys: Tensor, purpose: int, shape: tuple[int, ...]) -> Tensor:
    """A uniform random permutation of the last axis, for every clip and leading index.

    keys: int64, B. purpose: separates the draws of one clip. Returns int64, B x shape; each row of
    the last axis holds 0..n-1 in random order, all rows independent.
    """
    count = math.prod(shape)
    counters = torch.arange(count, device=keys.device, dtype=torch.int64)
    stream = _mix(_mix(keys) + purpose)
    bits = _mix(stream[:, None] + (counters + 1) * _GOLDEN)
    return bits.view(len(keys), *shape).argsort(dim=-1, stable=True)


def random_subsets(keys: Tensor, purpose: int, num_sets: int, size: int, picked: int) -> Tensor:
    """`picked` of `size` items of each set, uniform without replacement: int64, B x sets x picked.

    Sorted within a set: attention does not ask for an order, and memory likes this one.
    """
    if picked == size:
        return torch.arange(size, device=keys.device).expand(len(keys), num_sets, size)
    ranks = random_ranks(keys, purpose, (num_sets, size))
    return ranks[..., :picked].sort(dim=-1).values


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser; integer products wrap, as 64-bit arithmetic does."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
