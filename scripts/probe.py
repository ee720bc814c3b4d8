#!/usr/bin/env python3
"""Probe a finished run: linear and nearest-neighbour accuracy of its frozen encoder.

    python scripts/probe.py runs/demo
    python scripts/probe.py runs/my_run --train SHARDS --test SHARDS

Without --train and --test, on the probe shards of the run's recipe (also those of its `base:`). The
same encoder before training stands beside it. Results are added to the run's summary.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from arvideo_ds.config import PretrainRecipe
from arvideo_ds.data.manifest import ShardSet
from arvideo_ds.errors import UserError, command
from arvideo_ds.evaluation.features import extract
from arvideo_ds.evaluation.pretrained import load_pretrained, untrained
from arvideo_ds.evaluation.probe import linear_probe, nearest_neighbours
from arvideo_ds.train import run_folder


@command
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--train", help="labelled shards; default: the recipe's probe.train_shards")
    parser.add_argument("--test", help="labelled shards; default: the recipe's probe.test_shards")
    args = parser.parse_args()
    recipe = run_folder.read_recipe(args.run, PretrainRecipe)
    train, test = open_shards(args.train, args.test, recipe)
    print(f"probing {args.run}: train {train.name}, test {test.name}", file=sys.stderr, flush=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results: dict[str, object] = {}
    for prefix, model in (
        ("", load_pretrained(recipe, args.run / run_folder.MODEL)),
        ("untrained_", untrained(recipe)),
    ):
        known = extract(model.encoder, train, recipe, device)
        asked = extract(model.encoder, test, recipe, device)
        results[f"{prefix}linear_probe_accuracy"] = linear_probe(known, asked)
        results[f"{prefix}knn_accuracy"] = nearest_neighbours(known, asked)
        results["probe_clips_skipped"] = known.skipped + asked.skipped
    results["probe_chance_accuracy"] = round(1 / len(train.manifest.labels or "?"), 4)
    results["probe_features"] = recipe.probe.features
    results["probe_manifests"] = [train.hash, test.hash]
    run_folder.update_summary(args.run, results)
    print(json.dumps(results, indent=1))


def open_shards(
    train: str | None, test: str | None, recipe: PretrainRecipe
) -> tuple[ShardSet, ShardSet]:
    folders = (train or recipe.probe.train_shards, test or recipe.probe.test_shards)
    if folders[0] is None or folders[1] is None:
        raise UserError("the recipe names no probe shards; give --train SHARDS and --test SHARDS.")
    opened = ShardSet(folders[0]), ShardSet(folders[1])
    if opened[0].manifest.labels != opened[1].manifest.labels:
        raise UserError(
            f"{folders[0]} and {folders[1]} have different labels, so their label numbers do not "
            "mean the same. Make both from one set of class names."
        )
    return opened


if __name__ == "__main__":
    sys.exit(main())
