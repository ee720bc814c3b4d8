"""Our own format: the folder of a run reduced to its model.

model.safetensors   the encoder alone; of a fine-tuned run the whole classifier
recipe.yaml         the recipe, paths shortened; this package builds the model from it
labels.json         class names, where it was fine-tuned
config.json         shape and preprocessing in plain facts, for other programs
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import yaml

from arvideo_ds.evaluation.pretrained import load_classifier, load_trained_encoder
from arvideo_ds.exports.opened import Opened, save_weights, versions
from arvideo_ds.exports.source import (
    Source,
    architecture,
    logits_in_words,
    outputs,
    public_recipe,
)
from arvideo_ds.runs import run_folder


def export(source: Source, folder: Path) -> Opened:
    save_weights(source.model.state_dict(), folder / "model.safetensors")
    recipe = yaml.safe_dump(public_recipe(source.recipe), sort_keys=False)
    (folder / "recipe.yaml").write_text(recipe)
    (folder / "config.json").write_text(json.dumps(architecture(source), indent=1) + "\n")
    if source.labels is None:
        again = dataclasses.replace(source, model=load_trained_encoder(source.recipe, folder))
        how_to = "import arvideo_ds\nencoder = arvideo_ds.load_encoder('FOLDER')"
    else:
        (folder / run_folder.LABELS).write_text(json.dumps(source.labels, indent=1) + "\n")
        again = dataclasses.replace(source, model=load_classifier(source.recipe, folder)[0])
        how_to = "import arvideo_ds\nclassifier = arvideo_ds.load_classifier('FOLDER')"
    return Opened(
        run=lambda clips: outputs(again, clips),
        how_to=how_to,
        versions=versions("safetensors", "timm"),
        remarks=logits_in_words(source),
    )
