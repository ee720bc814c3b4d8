"""The format of this package: the folder of a run reduced to its model.

model.safetensors   the encoder; of a fine-tuned run the whole classifier
recipe.yaml         the recipe with shortened paths; this package builds the model from it
labels.json         class names of a fine-tuned run
config.json         shape and preprocessing, for other programs
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import yaml

from arvideo_ds.evaluation.pretrained import load_classifier, load_trained_encoder
from arvideo_ds.exports.source import (
    ExportSource,
    OpenedExport,
    architecture,
    logits_in_words,
    outputs,
    public_recipe,
    save_weights,
    versions,
)
from arvideo_ds.files.atomic import write_json
from arvideo_ds.runs import run_folder


def export(source: ExportSource, folder: Path) -> OpenedExport:
    save_weights(source.model.state_dict(), folder / "model.safetensors")
    recipe = yaml.safe_dump(public_recipe(source.recipe), sort_keys=False)
    (folder / "recipe.yaml").write_text(recipe)
    write_json(folder / "config.json", architecture(source))
    if source.labels is None:
        again = dataclasses.replace(source, model=load_trained_encoder(source.recipe, folder))
        how_to = "import arvideo_ds\nencoder = arvideo_ds.load_encoder('FOLDER')"
    else:
        write_json(folder / run_folder.LABELS, source.labels)
        again = dataclasses.replace(source, model=load_classifier(source.recipe, folder)[0])
        how_to = "import arvideo_ds\nclassifier = arvideo_ds.load_classifier('FOLDER')"
    return OpenedExport(
        run=lambda clips: outputs(again, clips),
        how_to=how_to,
        versions=versions("safetensors", "timm"),
        remarks=logits_in_words(source),
    )
