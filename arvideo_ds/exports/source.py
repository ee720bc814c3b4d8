"""What is exported: a finished run's model, and what the run says about itself.

B clips, T H W frames and pixels, N tokens, D width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from arvideo_ds.config import EncoderRecipe
from arvideo_ds.errors import UserError
from arvideo_ds.evaluation.pretrained import load_classifier, load_trained_encoder, read_labels
from arvideo_ds.models.classifier import Classifier
from arvideo_ds.models.cubes import PIXEL_MEAN, PIXEL_STD
from arvideo_ds.models.encoder import NORM_EPSILON, Encoder, encode_clips
from arvideo_ds.shards.manifest import ClassNames, by_set

# Tensors by what they are: "tokens" B N D, "features" B D (pooled), "logits" B x classes.
Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Source:
    """A run to export; `labels` are there where it was fine-tuned, then `model` classifies."""

    recipe: EncoderRecipe
    model: Encoder | Classifier
    labels: ClassNames | None
    summary: Mapping[str, Any]
    run: Mapping[str, Any]
    # File of the run that the weights are of.
    weights: str = "model.safetensors"

    @property
    def encoder(self) -> Encoder:
        return self.model.encoder if isinstance(self.model, Classifier) else self.model

    @property
    def clip_shape(self) -> tuple[int, int, int]:
        """T H W."""
        return self.recipe.geometry.clip


def read_source(folder: Path, recipe: EncoderRecipe, weights: str = "model.safetensors") -> Source:
    """The finished run in a folder. Errors: `UserError` where its weights are not its recipe's."""
    labels = read_labels(folder)
    model: Encoder | Classifier
    if labels is None:
        model = load_trained_encoder(recipe, folder / weights)
    else:
        model, labels = load_classifier(recipe, folder, weights)
    return Source(
        recipe,
        model,
        labels,
        read_json(folder / "summary.json"),
        read_json(folder / "run.json"),
        weights,
    )


@torch.no_grad()
def outputs(source: Source, clips: Tensor) -> Outputs:
    """What the trained model makes of clips B T H W 3; exports are held against it."""
    tokens = encode_clips(source.encoder, clips, source.recipe.patch)
    if not isinstance(source.model, Classifier):
        return {"tokens": tokens, "features": tokens.mean(1)}
    features = source.model.pool(tokens)
    return {"tokens": tokens, "features": features, "logits": source.model.classify(features)}


def class_counts(source: Source) -> dict[str, int]:
    """Number of classes of each label set; of one label that of the set ''."""
    return {name: len(classes) for name, classes in by_set(source.labels).items()}


def logits_in_words(source: Source) -> list[str]:
    """A remark for the card where the logits are those of several label sets."""
    if not isinstance(source.labels, Mapping):
        return []
    parts = ", then ".join(f"{count} of {name}" for name, count in class_counts(source).items())
    return [f"`logits` are {parts}: a softmax for each set."]


def pooled(source: Source) -> str:
    """What the exported features are, in words."""
    if source.recipe.pooling == "attention":
        return "what the classifier's class-attention layer reads of the tokens"
    return "the mean of the tokens"


def architecture(source: Source) -> dict[str, Any]:
    """Shape and preprocessing in plain facts: enough to build the model anywhere."""
    recipe, size = source.recipe, source.recipe.size
    return {
        "frames": recipe.data.frames,
        "size": list(recipe.data.size),
        "stride": recipe.data.stride,
        "sampling": recipe.data.sampling,
        "patch": list(recipe.patch),
        "token_grid": list(recipe.geometry.grid),
        "positions": recipe.model.positions,
        # Where the table is interpolated: the token grid that it is read off.
        "positions_of_grid": recipe.pretrained_grid and list(recipe.pretrained_grid),
        "model_size": recipe.model.size,
        "width": size.width,
        "depth": size.depth,
        "heads": size.heads,
        "mlp": size.mlp,
        "norm_epsilon": NORM_EPSILON,
        "pooling": source.recipe.pooling,
        "pixel_mean": list(PIXEL_MEAN),
        "pixel_std": list(PIXEL_STD),
        "classes": None if source.labels is None else sum(class_counts(source).values()),
        # Of several label sets the logits stand one set after another.
        "label_sets": class_counts(source) if isinstance(source.labels, Mapping) else None,
    }


def public_recipe(recipe: EncoderRecipe) -> dict[str, Any]:
    """The recipe as it may leave the machine: of paths only the last name."""
    tree: dict[str, Any] = _without_folders(recipe.model_dump(mode="json"))
    return tree


def _without_folders(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_folders(part) for key, part in value.items()}
    return PurePath(value).name if isinstance(value, str) and "/" in value else value


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of the run, empty where a run was copied without it. Errors: `UserError`."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}.") from None
    if not isinstance(facts, dict) or not isinstance(facts.get("versions", {}), dict):
        raise UserError(f"{path} is no JSON object; copy it again, or remove it.")
    return facts
