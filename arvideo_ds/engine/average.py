"""A moving average of the fp32 weights, kept where each rank keeps its share of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Average:
    """average <- decay x average + (1 - decay) x weights, after every applied step.

    `owners` are the tensors in which this rank's fp32 weights lie; they change in place.
    """

    def __init__(self, owners: Iterable[Tensor], decay: float) -> None:
        self._decay = decay
        self._averages = {id(owner): (owner, owner.detach().clone()) for owner in owners}

    def of(self, owner: Tensor) -> Tensor:
        """The average of an owner, of its shape."""
        return self._averages[id(owner)][1]

    @torch.no_grad()
    def update(self, refused: Tensor) -> None:
        """`refused` is 1 where the step was not applied: the average then stays too."""
        for owner, average in self._averages.values():
            share = (1 - self._decay) * (1 - refused.to(average, non_blocking=True))
            average.lerp_(owner.detach().to(average), share)
