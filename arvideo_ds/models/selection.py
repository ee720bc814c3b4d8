"""Selection of visible tokens and of tokens with a loss: one mechanism, several rules.

A rule gives every token a priority, larger first; `choose` takes the first ones. Tokens count along
(time, row, column) of the grid. B clips, N tokens.
"""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor

from arvideo_ds.config.objectives import Rule
from arvideo_ds.geometry import Triple
from arvideo_ds.models.draws import random_ranks, random_subsets

_TUBE_PURPOSE, _CELL_PURPOSE, _RANDOM_PURPOSE, _TIE_PURPOSE = 4, 5, 6, 7
# Places of a 2 x 2 cell, and times until it repeats.
_CELL = 4
# The rule "uniform" begins with every 7th time (LVMAE's every 7th latent frame).
_UNIFORM_STEP = 7


def tube(keys: Tensor, grid: Triple, places: int) -> Tensor:
    """Random tubes: the same `places` of the picture at all times, without replacement: B N, True.

    Source: VideoMAE (arXiv 2203.12602), section 3.3.
    """
    t, h, w = grid
    chosen = random_subsets(keys, _TUBE_PURPOSE, 1, h * w, places)[:, 0]
    seen = torch.zeros(len(keys), h * w, dtype=torch.bool, device=keys.device)
    return repeat(seen.scatter(1, chosen, value=True), "b p -> b (t p)", t=t)


def priorities(rule: Rule, keys: Tensor, grid: Triple, scores: Tensor | None = None) -> Tensor:
    """Priority of every token under a rule, larger first: B N float32.

    random: random order, which also breaks the ties of the other rules. uniform: every 7th time,
    then the times after these, and so on. running_cell: its tokens first. scores: as given, B N.
    """
    count = grid[0] * grid[1] * grid[2]
    if rule == "random":
        return random_ranks(keys, _RANDOM_PURPOSE, (count,)).float()
    if rule == "uniform":
        time = torch.arange(count, device=keys.device) // (grid[1] * grid[2])
        value = (-(time % _UNIFORM_STEP)).expand(len(keys), count)
    elif rule == "running_cell":
        value = running_cell(keys, grid).float()
    elif scores is None:
        raise ValueError("the rule needs scores, and the batch has none")
    else:
        value = scores
    # Shuffled, then sorted stably by value.
    shuffled = random_ranks(keys, _TIE_PURPOSE, (count,))
    ranked = shuffled.gather(1, value.gather(1, shuffled).argsort(dim=1, stable=True))
    return ranked.argsort(dim=1).float()


def choose(priority: Tensor, allowed: Tensor, count: int) -> Tensor:
    """The `count` allowed tokens of highest priority, B N booleans; each clip must have as many."""
    ranked = priority.masked_fill(~allowed, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(allowed).scatter(1, ranked[:, :count], value=True)


def running_cell(keys: Tensor, grid: Triple) -> Tensor:
    """Two places of every 2 x 2 cell, moving by one place each time, from a random start: B N.

    Each place is chosen in two of four times, so exactly half of any tubes.
    Source: VideoMAE V2 (arXiv 2303.16727), section 3.2.
    """
    t, h, w = grid
    times, rows, columns = (torch.arange(n, device=keys.device) for n in (t, h, w))
    place = rows[:, None] % 2 * 2 + columns % 2
    phase = rearrange(place, "h w -> (h w)") - times[:, None]
    start = random_ranks(keys, _CELL_PURPOSE, (_CELL,))[:, 0]
    return (phase.view(1, -1) - start[:, None]) % _CELL < _CELL // 2


def tokens_of(chosen: Tensor, count: int) -> Tensor:
    """Indices of the chosen tokens, ascending: B count. Every row must choose `count`."""
    return (~chosen).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]
