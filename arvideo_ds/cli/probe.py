"""Probe a finished run: how much its frozen encoder knows of the labels.

    arvideo probe runs/demo
    arvideo probe runs/my_run --train SHARDS --test SHARDS
    arvideo probe runs/my_run --set motion=SSV2/train,SSV2/test \
        --set appearance=UCF/train,UCF/test --attentive 10

Linear and nearest-neighbour accuracy, and other probes on request; docs/features.md says how to add
one. Without options on the probe shards of the run's recipe (also those of its `base:`); --set
probes other data sets, side by side. The same encoder before training is probed as well. Results
are added to the run's summary.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from arvideo_ds.arguments import CommandParser, require_at_least
from arvideo_ds.config import PretrainRecipe
from arvideo_ds.errors import UserError, command
from arvideo_ds.evaluation.probes import DEFAULT_PROBES, PROBES, open_probe_shards
from arvideo_ds.runs import run_folder


def parse_arguments() -> argparse.Namespace:
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
        "--probe",
        action="append",
        default=[],
        dest="probes",
        metavar="NAME",
        help=f"one more of {', '.join(PROBES)}; may be repeated",
    )
    parser.add_argument(
        "--attentive", type=int, default=0, metavar="EPOCHS", help="attentive probe; default none"
    )
    args = parser.parse_args()
    require_at_least(0, args, "attentive")
    return args


@command
def main() -> None:
    args = parse_arguments()
    recipe = run_folder.read_recipe(args.run, PretrainRecipe)
    # Only now: torch takes seconds to load.
    from arvideo_ds.evaluation.attentive import AttentiveProbe
    from arvideo_ds.evaluation.probing import probe_run, side_by_side

    probes = {
        name: PROBES.choose(name, key="--probe")() for name in (*DEFAULT_PROBES, *args.probes)
    }
    if args.attentive:
        probes["attentive_probe"] = AttentiveProbe(args.attentive)

    def on(train: str | None, test: str | None) -> dict[str, Any]:
        shards = open_probe_shards(recipe.probe, train, test)
        names = [opened.name for opened in shards]
        print(f"probing {args.run}: train {names[0]}, test {names[1]}", file=sys.stderr, flush=True)
        return probe_run(args.run, recipe, *shards, probes)

    sets = dict(parse_set(text) for text in args.sets)
    # With other sets alone, the recipe's own are not probed.
    results = on(args.train, args.test) if not sets or args.train or args.test else {}
    more = {name: on(*pair) for name, pair in sets.items()}
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
