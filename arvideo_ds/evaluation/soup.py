"""Model soups: the mean of several fine-tuned models' weights, as good as their ensemble or better.

They must begin with the same pretrained weights, or their mean means nothing.
Source: Wortsman et al. 2022, arXiv 2203.05482.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from arvideo_ds.errors import UserError

State = dict[str, Tensor]


def uniform_soup(states: Sequence[State]) -> State:
    """The mean of all, summed in float64. Errors: `UserError` where names or shapes differ."""
    _require_alike(states)
    means = {}
    for name, first in states[0].items():
        total = torch.stack([state[name].double() for state in states]).mean(0)
        means[name] = total.to(first.dtype)
    return means


def greedy_soup(
    states: Sequence[State], score: Callable[[State], float]
) -> tuple[State, list[int], float]:
    """From the best one on, each is added where the mean scores no worse with it.

    score: higher is better, on data that the result is not reported on. Returns the soup, the
    numbers of its members in the order they came in, and its score.
    """
    _require_alike(states)
    alone = [score(state) for state in states]
    first, *others = sorted(range(len(states)), key=lambda number: -alone[number])
    members, best, soup = [first], alone[first], states[first]
    for number in others:
        trial = uniform_soup([states[member] for member in (*members, number)])
        scored = score(trial)
        if scored >= best:
            members, best, soup = [*members, number], scored, trial
    return soup, members, best


def _require_alike(states: Sequence[State]) -> None:
    shapes = [{name: tuple(value.shape) for name, value in state.items()} for state in states]
    for number, other in enumerate(shapes[1:], start=2):
        if other != shapes[0]:
            names = sorted(name for name, _ in other.items() ^ shapes[0].items())
            raise UserError(
                f"model {number} and model 1 differ in {names[0]}; a soup is of models alike."
            )
