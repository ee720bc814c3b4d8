"""Codes of finite scalar quantisation back to latents.

Source: Mentzer et al. 2023 (arXiv 2309.15505), section 3: the code counts through the levels of
all numbers of a latent, the first one fastest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def latents_of(codes: Tensor, levels: Sequence[int]) -> Tensor:
    """Latents, float32, ... len(levels), each number in -1..1, of codes int64 of any shape."""
    numbers = []
    # One by one: a tensor of the levels would be sent to the device, and the host wait for that.
    for level in levels:
        half = level // 2
        numbers.append((codes % level - half) / half)
        codes = codes // level
    return torch.stack(numbers, dim=-1)
