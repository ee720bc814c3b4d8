"""The classifier of a fine-tuned run, from its recipe, labels and weights."""

from __future__ import annotations

import json
from pathlib import Path

from arvideo_ds.config import FinetuneRecipe
from arvideo_ds.errors import UserError
from arvideo_ds.models.classifier import Classifier
from arvideo_ds.models.weight_files import read_weights


def load_finetuned(recipe: FinetuneRecipe, labels: Path, weights: Path) -> Classifier:
    """The classifier with the weights of `weights` (safetensors), in evaluation mode.

    labels: labels.json of the run. Errors: `UserError` when a file is missing, damaged, or of
    another model.
    """
    model = Classifier(recipe, len(read_labels(labels)))
    try:
        model.load_state_dict(read_weights(weights))
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise UserError(f"{weights} does not fit the recipe beside it: {first}") from None
    return model.eval()


def read_labels(path: Path) -> list[str]:
    """Class names, by label number. Errors: `UserError` where there are none."""
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read the class names in {path}: {error}. A run of scripts/finetune.py writes "
            "them."
        ) from None
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise UserError(f"{path} must hold a list of class names.")
    return labels
