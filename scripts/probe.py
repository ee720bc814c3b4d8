#!/usr/bin/env python3
"""Probe a finished run: how much its frozen encoder knows of the labels.

    python scripts/probe.py runs/demo
    python scripts/probe.py runs/my_run --train SHARDS --test SHARDS
    python scripts/probe.py runs/my_run --set motion=SSV2/train,SSV2/test \
        --set appearance=UCF/train,UCF/test --attentive 10

Linear and nearest-neighbour accuracy, and an attentive probe on request. Without options on the
probe shards of the run's recipe (also those of its `base:`); --set probes other data sets, side by
side. The same encoder before training stands beside it. Results are added to the run's
summary.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from arvideo_ds.arguments import CommandParser
from arvideo_ds.config import PretrainRecipe
from arvideo_ds.data.loader import worker_count
from arvideo_ds.errors import UserError, command
from arvideo_ds.evaluation.attentive import attentive_probe
from arvideo_ds.evaluation.features import extract
from arvideo_ds.evaluation.pretrained import load_trained_encoder, untrained
from arvideo_ds.evaluation.probe import linear_probe, nearest_neighbours
from arvideo_ds.host import available_cores
from arvideo_ds.runs import run_folder
from arvideo_ds.shards.manifest import ShardSet, require_same_labels


@command
def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--train", help="labelled shards; default: the recipe's probe.train_shards")
    parser.add_argument("--test", help="labelled shards; default: the recipe's probe.test_shards")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="sets",
        metavar="NAME=TRAIN,TEST",
        help="another pair of labelled shards; may be repeated",
    )
    parser.add_argument(
        "--attentive", type=int, default=0, metavar="EPOCHS", help="attentive probe; default none"
    )
    args = parser.parse_args()
    if args.attentive < 0:
        raise UserError(f"--attentive {args.attentive} must be 0 or more epochs.")
    recipe = run_folder.read_recipe(args.run, PretrainRecipe)
    sets = dict(parse_set(text) for text in args.sets)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results: dict[str, object] = {}
    # With other sets alone, the recipe's own are not asked for.
    if not sets or args.train or args.test:
        train, test = open_shards(args.train, args.test, recipe)
        results |= probe(args.run, recipe, train, test, device, args.attentive)
    more = {
        name: probe(args.run, recipe, *open_shards(*pair, recipe), device, args.attentive)
        for name, pair in sets.items()
    }
    if more:
        results["probes"] = more
    run_folder.update_summary(args.run, results)
    print(json.dumps(results, indent=1))
    for line in side_by_side(more):
        print(line)


def parse_set(text: str) -> tuple[str, tuple[str, str]]:
    name, _, folders = text.partition("=")
    pair = folders.split(",")
    if not name or len(pair) != 2 or not all(pair):
        raise UserError(f"--set {text} must be NAME=TRAIN,TEST.")
    return name, (pair[0], pair[1])


def probe(
    run: Path,
    recipe: PretrainRecipe,
    train: ShardSet,
    test: ShardSet,
    device: torch.device,
    attentive_epochs: int,
) -> dict[str, object]:
    print(f"probing {run}: train {train.name}, test {test.name}", file=sys.stderr, flush=True)
    results: dict[str, object] = {}
    for prefix, encoder in (
        ("", load_trained_encoder(recipe, run)),
        ("untrained_", untrained(recipe).encoder),
    ):
        known = extract(encoder, train, recipe, device)
        asked = extract(encoder, test, recipe, device)
        results[f"{prefix}linear_probe_accuracy"] = linear_probe(known, asked)
        results[f"{prefix}knn_accuracy"] = nearest_neighbours(known, asked)
        results["probe_clips_skipped"] = known.skipped + asked.skipped
        if attentive_epochs:
            results[f"{prefix}attentive_probe_accuracy"] = attentive_probe(
                encoder,
                train,
                test,
                recipe,
                device,
                epochs=attentive_epochs,
                num_workers=worker_count(recipe, cores=len(available_cores())),
            )
    results["probe_chance_accuracy"] = round(1 / len(train.manifest.labels or "?"), 4)
    results["probe_features"] = recipe.probe.features
    results["probe_clips"] = recipe.probe.clips
    results["probe_manifests"] = [train.hash, test.hash]
    return results


def side_by_side(sets: dict[str, dict[str, object]]) -> list[str]:
    """A table: a row per data set, trained and (untrained)."""
    kinds = ("linear_probe", "knn", "attentive_probe")
    lines = []
    for name, found in sets.items():
        cells = [
            f"{kind} {100 * float(str(found[f'{kind}_accuracy'])):.1f} "
            f"({100 * float(str(found[f'untrained_{kind}_accuracy'])):.1f})"
            for kind in kinds
            if f"{kind}_accuracy" in found
        ]
        lines.append(f"{name}: {', '.join(cells)}; percent, untrained in brackets")
    return lines


def open_shards(
    train: str | None, test: str | None, recipe: PretrainRecipe
) -> tuple[ShardSet, ShardSet]:
    folders = (train or recipe.probe.train_shards, test or recipe.probe.test_shards)
    if folders[0] is None or folders[1] is None:
        raise UserError("the recipe names no probe shards; give --train SHARDS and --test SHARDS.")
    opened = ShardSet(folders[0]), ShardSet(folders[1])
    labels = [shards.manifest.labels for shards in opened]
    require_same_labels(folders[0], labels[0], folders[1], labels[1])
    return opened


if __name__ == "__main__":
    sys.exit(main())
