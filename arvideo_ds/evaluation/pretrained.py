"""The model of a finished run, from its recipe and weights."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from arvideo_ds.config import PretrainRecipe
from arvideo_ds.errors import UserError
from arvideo_ds.models.objective import Objective
from arvideo_ds.tasks.pretrain import build_objective


def load_pretrained(recipe: PretrainRecipe, weights: Path) -> Objective:
    """The objective's model with the weights of `weights` (safetensors), in evaluation mode.

    Errors: `UserError` when the file is missing, damaged, or of another model.
    """
    model = build_objective(recipe)
    try:
        state = load_file(weights)
    except FileNotFoundError:
        raise UserError(
            f"there is no {weights}: it is written when a run finishes. Go on with the run first."
        ) from None
    except SafetensorError as error:
        raise UserError(f"{weights} is damaged ({error}); train or copy it again.") from None
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise UserError(f"{weights} does not fit the recipe beside it: {first}") from None
    return model.eval()


def untrained(recipe: PretrainRecipe) -> Objective:
    """The same model as the run began with: what training has to beat."""
    torch.manual_seed(recipe.train.seed)
    return build_objective(recipe).eval()
