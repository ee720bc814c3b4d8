"""Models of finished runs, from their recipes and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

import torch
from pydantic import Field, TypeAdapter
from safetensors import SafetensorError
from torch import nn

from arvideo_ds.config import EncoderRecipe, PretrainRecipe
from arvideo_ds.errors import UserError
from arvideo_ds.files.tensors import load_tensors
from arvideo_ds.models.classifier import Classifier
from arvideo_ds.models.encoder import Encoder, build_encoder
from arvideo_ds.models.layouts import load_encoder
from arvideo_ds.models.objective import MODELS, Objective
from arvideo_ds.models.weight_files import load_state, read_weights
from arvideo_ds.runs import run_folder
from arvideo_ds.shards.manifest import ClassNames, by_set

AnyModel = TypeVar("AnyModel", bound=nn.Module)
_LABELS: TypeAdapter[ClassNames] = TypeAdapter(
    list[str] | Annotated[dict[str, list[str]], Field(min_length=1)]
)


def build_objective(recipe: PretrainRecipe) -> Objective:
    """The model of `objective.name`, initialised from torch's global generator."""
    build = MODELS.choose(recipe.objective.name, key="objective.name")
    return build(recipe.objective, recipe.encoder, recipe.decoder)


def with_weights(model: AnyModel, weights: Path) -> AnyModel:
    """Load a file of weights (safetensors) into a model; returns it in evaluation mode.

    Errors: `UserError` when the file is missing, damaged, or of another model.
    """
    try:
        state = load_tensors(weights)
    except FileNotFoundError:
        raise UserError(
            f"there is no {weights}: it is written when a run finishes. Finish the run first."
        ) from None
    except SafetensorError as error:
        raise UserError(f"{weights} is damaged ({error}); train or copy it again.") from None
    load_state(model, state, f"{weights} does not fit the recipe beside it")
    return model.eval()


def untrained(recipe: PretrainRecipe) -> Objective:
    """The initial model of the run, in evaluation mode."""
    torch.manual_seed(recipe.train.seed)
    return build_objective(recipe).eval()


def read_labels(folder: Path) -> ClassNames | None:
    """Class names of a model, by label set where it has several; None where it has no classes.

    Errors: `UserError` where the file is neither a list of names nor a list for each label set.
    """
    path = folder / run_folder.LABELS
    if not path.is_file():
        return None
    try:
        return _LABELS.validate_json(path.read_bytes(), strict=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}.") from None
    except ValueError:
        raise UserError(
            f"{path} must be JSON: a list of class names, or one for each label set."
        ) from None


def require_classifier(folder: Path) -> ClassNames:
    """The class names of a fine-tuned run. Errors: `UserError` where it has none."""
    labels = read_labels(folder)
    if labels is None:
        raise UserError(
            f"{folder} has no {run_folder.LABELS}. Give the folder of a fine-tuned run, or of its "
            "export."
        )
    return labels


def load_trained_encoder(recipe: EncoderRecipe, weights: Path) -> Encoder:
    """The complete encoder of a pretraining run or of its export, in evaluation mode.

    weights: the folder, or a file in it.
    """
    encoder = build_encoder(recipe.encoder)
    load_encoder(encoder, weights, patch=recipe.patch, min_match=1.0)
    return encoder.eval()


def load_classifier(
    recipe: EncoderRecipe, folder: Path, weights: str | None = None
) -> tuple[Classifier, ClassNames]:
    """The classifier of a fine-tuned run or of its export, in evaluation mode, and its classes.

    weights: file name in the folder; by default that of the finished run. Errors: `UserError` where
    there are no labels, or the weights are not the recipe's classifier.
    """
    labels = require_classifier(folder)
    count = sum(map(len, by_set(labels).values()))
    pooling, depth = recipe.pooling, recipe.pooling_depth
    model = Classifier(recipe.encoder, count, pooling=pooling, pooling_depth=depth)
    state = read_weights(folder if weights is None else folder / weights)
    wrong = f"the weights in {folder} are not the classifier of its recipe and its {count} labels"
    load_state(model, state, wrong)
    return model.eval(), labels
