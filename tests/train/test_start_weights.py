"""A fine-tuning that begins with a fine-tuned run, or its export, takes what belongs to both."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from arvideo_ds.config import FinetuneRecipe
from arvideo_ds.exports.source import export_encoder, read_source
from arvideo_ds.files.tensors import save_tensors
from arvideo_ds.models.classifier import Classifier
from arvideo_ds.models.layouts import load_classifier_weights
from arvideo_ds.runs import run_folder
from arvideo_ds.tasks.specs.finetune import Finetuning

Make = Callable[..., FinetuneRecipe]
CLASSES = ["bend", "jack", "walk"]


def shards(*names: str) -> Any:
    return SimpleNamespace(manifest=SimpleNamespace(class_names=lambda heads: list(names)))


@pytest.fixture
def tuned(tiny_finetune: Make, tmp_path: Path) -> Path:
    """A finished fine-tuned run's folder."""
    folder = tmp_path / "tuned"
    folder.mkdir()
    run_folder.write_recipe(folder, tiny_finetune())
    (folder / run_folder.LABELS).write_text(json.dumps(CLASSES))
    model = Classifier(tiny_finetune().encoder, len(CLASSES))
    torch.nn.init.normal_(model.norm.weight)
    save_tensors(model.state_dict(), folder / run_folder.MODEL)
    return folder


@pytest.mark.parametrize("exported", [False, True], ids=["run", "export"])
def test_a_fine_tuned_run_passes_on_its_norm_and_of_the_same_classes_its_head(
    exported: bool, tuned: Path, tiny_finetune: Make, tmp_path: Path
) -> None:
    recipe, folder = tiny_finetune(), tuned
    source = read_source(tuned, recipe)
    if exported:
        folder = tmp_path / "export"
        folder.mkdir()
        export_encoder(source, folder)
    theirs = source.model.state_dict()
    for names, kept in ((CLASSES, True), (CLASSES[::-1], False), (["a", "b"], False)):
        target = Classifier(recipe.encoder, len(names))
        same = Finetuning(recipe).same_classes(folder / run_folder.MODEL, shards(*names))
        report = load_classifier_weights(target, folder, patch=recipe.patch, same_classes=same)
        assert torch.equal(target.norm.weight, theirs["norm.weight"]), report
        assert torch.equal(target.head.weight, theirs["head.weight"]) == kept, report


def test_weights_that_do_not_say_their_classes_are_of_unknown_ones(
    tuned: Path, tiny_finetune: Make
) -> None:
    (tuned / run_folder.LABELS).unlink()
    assert Finetuning(tiny_finetune()).same_classes(tuned, shards(*CLASSES)) is None
