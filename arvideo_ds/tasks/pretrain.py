"""Pretraining with any objective."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from arvideo_ds.config import PretrainRecipe
from arvideo_ds.data.loader import Batch
from arvideo_ds.models.arvideo import ARVideo
from arvideo_ds.models.objective import Objective

# A new objective is one file in models/ and one line here.
OBJECTIVES: dict[str, Callable[[PretrainRecipe], Objective]] = {"arvideo": ARVideo}


def build_objective(recipe: PretrainRecipe) -> Objective:
    """The model of `objective.name`, freshly initialised from torch's global generator."""
    return OBJECTIVES[recipe.objective.name](recipe)


class Pretrain(nn.Module):
    """Mean loss over the clips of a batch that decoded; 0 if none did."""

    def __init__(self, recipe: PretrainRecipe) -> None:
        super().__init__()
        self.model = build_objective(recipe)

    def forward(self, batch: Batch) -> Tensor:
        per_clip = self.model(batch.clips, batch.keys)
        valid = batch.valid.to(per_clip.dtype)
        return (per_clip * valid).sum() / valid.sum().clamp(min=1)
