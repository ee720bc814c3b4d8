"""The model of a finished run, from its recipe and weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

import torch
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


def build_objective(recipe: PretrainRecipe) -> Objective:
    """The model of `objective.name`, freshly initialised from torch's global generator."""
    build = MODELS.choose(recipe.objective.name, key="objective.name")
    return build(recipe.objective, recipe.encoder, recipe.decoder)


def load_pretrained(recipe: PretrainRecipe, weights: Path) -> Objective:
    """The objective's model with the weights of `weights` (safetensors), in evaluation mode.

    Errors: `UserError` when the file is missing, damaged, or of another model.
    """
    return with_weights(build_objective(recipe), weights)


def with_weights(model: AnyModel, weights: Path) -> AnyModel:
    """A model of a run's recipe with the weights of a file, in evaluation mode.

    Errors: as `load_pretrained`.
    """
    try:
        state = load_tensors(weights)
    except FileNotFoundError:
        raise UserError(
            f"there is no {weights}: it is written when a run finishes. Go on with the run first."
        ) from None
    except SafetensorError as error:
        raise UserError(f"{weights} is damaged ({error}); train or copy it again.") from None
    load_state(model, state, f"{weights} does not fit the recipe beside it")
    return model.eval()


def untrained(recipe: PretrainRecipe) -> Objective:
    """The same model as the run began with: what training has to beat."""
    torch.manual_seed(recipe.train.seed)
    return build_objective(recipe).eval()


def read_labels(folder: Path) -> ClassNames | None:
    """Class names beside a model, by label set where it has several; None where it has no classes.

    Errors: `UserError` where the file holds no list of names, nor one for each label set.
    """
    path = folder / run_folder.LABELS
    if not path.is_file():
        return None
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}.") from None
    lists = list(labels.values()) if isinstance(labels, dict) else [labels]
    if not lists or not all(_is_names(names) for names in lists):
        raise UserError(f"{path} must hold a list of class names, or one for each label set.")
    names: ClassNames = labels
    return names


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def require_classifier(folder: Path) -> ClassNames:
    """The class names of a fine-tuned run. Errors: `UserError` where it classifies nothing."""
    labels = read_labels(folder)
    if labels is None:
        raise UserError(
            f"{folder} holds no {run_folder.LABELS}, so it classifies nothing: it is no fine-tuned "
            "run. Give the folder of one, or of its export."
        )
    return labels


def load_trained_encoder(recipe: EncoderRecipe, weights: Path) -> Encoder:
    """The encoder alone of a pretraining run or of its export, whole, in evaluation mode.

    weights: the folder, or a file in it.
    """
    encoder = build_encoder(recipe.encoder)
    load_encoder(encoder, weights, patch=recipe.patch, min_match=1.0)
    return encoder.eval()


def load_classifier(
    recipe: EncoderRecipe, folder: Path, weights: str | None = None
) -> tuple[Classifier, ClassNames]:
    """The classifier of a fine-tuned run or of its export, in evaluation mode, and its classes.

    weights: name of their file in the folder; by default that of the finished run. Errors:
    `UserError` where there are no labels, or the weights are not the recipe's classifier.
    """
    labels = require_classifier(folder)
    count = sum(map(len, by_set(labels).values()))
    model = Classifier(recipe.encoder, count, pooling=recipe.pooling)
    state = read_weights(folder if weights is None else folder / weights)
    wrong = f"the weights in {folder} are not the classifier of its recipe and its {count} labels"
    load_state(model, state, wrong)
    return model.eval(), labels
