"""The run or public classifier to export, its facts, and the format of this package: its model.

model.safetensors   the encoder; of a fine-tuned run the whole classifier
recipe.yaml         the recipe with shortened paths; this package builds the model from it
labels.json         class names of a fine-tuned run
config.json         shape and preprocessing, for other programs

B clips, T H W frames and pixels, N tokens, D width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any

import torch
import yaml
from torch import Tensor

from arvideo_ds.config import EncoderRecipe, FinetuneRecipe
from arvideo_ds.errors import UserError
from arvideo_ds.evaluation.pretrained import (
    load_classifier,
    load_trained_encoder,
    read_labels,
    require_classifier,
)
from arvideo_ds.evaluation.public import (
    NO_OPTIONS,
    PublicClassifier,
    PublicOptions,
    is_public,
    read_public,
)
from arvideo_ds.files.atomic import write_json
from arvideo_ds.files.tensors import save_tensors
from arvideo_ds.geometry import Triple
from arvideo_ds.models.classifier import Classifier
from arvideo_ds.models.cubes import PIXEL_MEAN, PIXEL_STD
from arvideo_ds.models.encoder import NORM_EPSILON, Encoder, encode_clips
from arvideo_ds.runs import run_folder
from arvideo_ds.shards.manifest import ClassNames, by_set

# "tokens" B N D, "features" B D (pooled), "logits" B x classes.
Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class ExportSource:
    """A run to export. labels: of a fine-tuned run; `model` is then a classifier."""

    recipe: EncoderRecipe
    model: Encoder | Classifier
    labels: ClassNames | None
    summary: Mapping[str, Any]
    run: Mapping[str, Any]
    # The run's file of these weights.
    weights: str = "model.safetensors"
    # Of a model of another project, which is no run.
    public: PublicClassifier | None = None

    @property
    def encoder(self) -> Encoder:
        return self.model.encoder if isinstance(self.model, Classifier) else self.model

    @property
    def classifier(self) -> Classifier:
        """The model where it is a classifier. Errors: `UserError`."""
        if not isinstance(self.model, Classifier):
            raise UserError(f"{self.weights} is an encoder, which classifies nothing.")
        return self.model

    @property
    def class_names(self) -> ClassNames:
        """The labels where there are any. Errors: `UserError`."""
        if self.labels is None:
            raise UserError(f"{self.weights} has no class names.")
        return self.labels

    @property
    def class_counts(self) -> dict[str, int]:
        """Number of classes by label set; '' is the name of a single label."""
        return {name: len(classes) for name, classes in by_set(self.labels).items()}


@dataclass(frozen=True)
class OpenedExport:
    """An exported model, opened from its folder as its users will open it.

    run: clips B T H W 3, uint8, to outputs. how_to: lines of Python. remarks: for the card. tags:
    of the card's front matter.
    """

    run: Callable[[Tensor], Outputs]
    how_to: str
    versions: dict[str, str]
    remarks: list[str] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)


def read_source(
    folder: Path, recipe: EncoderRecipe, weights: str = "model.safetensors"
) -> ExportSource:
    """The finished run in a folder. Errors: `UserError` where weights and recipe do not fit."""
    labels = read_labels(folder)
    model: Encoder | Classifier
    if labels is None:
        model = load_trained_encoder(recipe, folder / weights)
    else:
        model, labels = load_classifier(recipe, folder, weights)
    summary, run = (read_json(folder / name) for name in ("summary.json", "run.json"))
    return ExportSource(recipe, model, labels, summary, run, weights)


def open_model(
    path: Path,
    kind: type[EncoderRecipe] = EncoderRecipe,
    *,
    weights: str | None = None,
    public: PublicOptions = NO_OPTIONS,
    needs_labels: bool = True,
) -> ExportSource:
    """A finished run, its export with --format encoder, or a public classifier (`read_public`).

    kind: of the run's recipe; FinetuneRecipe requires a classifier. weights: a key of
    `run_folder.WEIGHTS`; default: best if the run has it. Errors: `UserError`.
    """
    if is_public(path):
        opened = read_public(path, public, needs_labels=needs_labels, weights=weights)
        name = opened.weights.name
        return ExportSource(opened.recipe, opened.model, opened.labels, {}, {}, name, opened)
    public.require_unused(path)
    recipe = run_folder.read_recipe(path, kind)
    if issubclass(kind, FinetuneRecipe):
        _ = require_classifier(path)
    return read_source(path, recipe, run_folder.WEIGHTS[run_folder.choose_weights(path, weights)])


def export_encoder(source: ExportSource, folder: Path) -> OpenedExport:
    save_weights(source.model.state_dict(), folder / "model.safetensors")
    recipe = yaml.safe_dump(public_recipe(source.recipe), sort_keys=False)
    (folder / "recipe.yaml").write_text(recipe)
    write_json(folder / "config.json", architecture(source))
    what = "encoder"
    if source.labels is not None:
        what = "classifier"
        write_json(folder / run_folder.LABELS, source.labels)
    again = read_source(folder, source.recipe)
    return OpenedExport(
        run=lambda clips: outputs(again, clips),
        how_to=f"import arvideo_ds\n{what} = arvideo_ds.load_{what}('FOLDER')",
        versions=versions("safetensors", "timm"),
        remarks=logits_in_words(source),
    )


@torch.no_grad()
def outputs(source: ExportSource, clips: Tensor) -> Outputs:
    """Outputs of the trained model for clips B T H W 3."""
    return outputs_of(source.model, clips, source.recipe.patch)


def outputs_of(model: Encoder | Classifier, clips: Tensor, patch: Triple) -> Outputs:
    if not isinstance(model, Classifier):
        tokens = encode_clips(model, clips, patch)
        return {"tokens": tokens, "features": tokens.mean(1)}
    tokens = encode_clips(model.encoder, clips, patch)
    features = model.pool(tokens)
    return {"tokens": tokens, "features": features, "logits": model.classify(features)}


def save_weights(state: dict[str, Tensor], path: Path) -> None:
    """Save as safetensors; tensors that share memory are copied."""
    whole = {
        name: value.detach().clone(memory_format=torch.contiguous_format)
        for name, value in state.items()
    }
    # safetensors makes files that only their owner can read.
    path.touch()
    mode = path.stat().st_mode
    save_tensors(whole, path)
    path.chmod(mode)


def versions(*packages: str) -> dict[str, str]:
    return {package: metadata.version(package) for package in ("torch", *packages)}


def logits_in_words(source: ExportSource) -> list[str]:
    """A remark for the card where the logits are of several label sets."""
    if not isinstance(source.labels, Mapping):
        return []
    parts = ", then ".join(f"{count} of {name}" for name, count in source.class_counts.items())
    return [f"`logits` are {parts}: a softmax for each set."]


def architecture(source: ExportSource) -> dict[str, Any]:
    """Shape and preprocessing: enough to build the model anywhere."""
    recipe, size = source.recipe, source.recipe.size
    return {
        "frames": recipe.data.frames,
        "size": list(recipe.data.size),
        **recipe.data.model_dump(include={"stride", "fps", "test_short_side"}, exclude_none=True),
        "sampling": recipe.data.sampling,
        "patch": list(recipe.patch),
        "token_grid": list(recipe.geometry.grid),
        "positions": recipe.model.positions,
        # The token grid that the table is interpolated from, if any.
        "positions_of_grid": recipe.pretrained_grid and list(recipe.pretrained_grid),
        "model_size": recipe.model.size,
        "width": size.width,
        "depth": size.depth,
        "heads": size.heads,
        "mlp": size.mlp,
        "norm_epsilon": NORM_EPSILON,
        "pooling": recipe.pooling,
        "pixel_mean": list(PIXEL_MEAN),
        "pixel_std": list(PIXEL_STD),
        "classes": None if source.labels is None else sum(source.class_counts.values()),
        # In the order of the logits.
        "label_sets": source.class_counts if isinstance(source.labels, Mapping) else None,
    }


def public_recipe(recipe: EncoderRecipe) -> dict[str, Any]:
    """The recipe with only the last name of each path."""
    return _without_folders(recipe.model_dump(mode="json"))


def _without_folders(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_folders(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_folders(part) for part in value]
    return PurePath(value).name if isinstance(value, str) and "/" in value else value


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of the run, empty where the file is missing. Errors: `UserError`."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}.") from None
    if not isinstance(facts, dict) or not isinstance(facts.get("versions", {}), dict):
        raise UserError(f"{path} is not a JSON object; copy it again, or remove it.")
    return facts
