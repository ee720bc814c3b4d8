"""Which tokens of a clip are seen and which are reconstructed: the rules of masked autoencoders.

A rule gives B N booleans; tokens count along (time, row, column) of the grid. B clips, N tokens.
"""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor

from arvideo_ds.geometry import Triple
from arvideo_ds.models.draws import random_ranks, random_subsets

_TUBE_PURPOSE, _CELL_PURPOSE = 4, 5
# A cell is 2 x 2 places; it comes round after so many times.
_CELL = 4


def tube(keys: Tensor, grid: Triple, places: int) -> Tensor:
    """The same `places` of the picture at all times, uniform without replacement.

    Source: VideoMAE (arXiv 2203.12602), section 3.3.
    """
    t, h, w = grid
    chosen = random_subsets(keys, _TUBE_PURPOSE, 1, h * w, places)[:, 0]
    seen = torch.zeros(len(keys), h * w, dtype=torch.bool, device=keys.device)
    return repeat(seen.scatter(1, chosen, value=True), "b p -> b (t p)", t=t)


def running_cell(keys: Tensor, grid: Triple) -> Tensor:
    """Two places of every 2 x 2 cell, which move on by one place each time; a random start.

    Within four times each place is chosen twice, so of tubes exactly half of the tokens.
    Source: VideoMAE V2 (arXiv 2303.16727), section 3.2.
    """
    t, h, w = grid
    place = torch.arange(h)[:, None] % 2 * 2 + torch.arange(w) % 2
    phase = rearrange(place, "h w -> (h w)") - torch.arange(t)[:, None]
    start = random_ranks(keys, _CELL_PURPOSE, (_CELL,))[:, 0]
    return (phase.view(1, -1).to(keys.device) - start[:, None]) % _CELL < _CELL // 2


def tokens_of(chosen: Tensor, count: int) -> Tensor:
    """Indices of the chosen tokens, ascending: B count. Every row must choose `count`."""
    return (~chosen).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]
