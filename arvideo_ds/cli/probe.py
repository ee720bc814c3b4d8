"""Probe a finished run: how well its frozen encoder separates the labels.

    arvideo probe runs/demo
    arvideo probe runs/my_run --train SHARDS --test SHARDS
    arvideo probe runs/my_run --set motion=SSV2/train,SSV2/test \
        --set appearance=UCF/train,UCF/test --attentive 10

Linear and k-NN accuracy, and other probes on request; docs/features.md explains how to add one.
V-JEPA 2's attentive probe is a run of its own: `arvideo finetune --recipe probe_own`. Default: the
probe shards of the run's recipe (also inherited from its `base:`); --set probes other
data sets, side by side. The untrained encoder is probed as well. Results are added to the run's
summary.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from arvideo_ds.arguments import CommandParser, require_at_least
from arvideo_ds.cli import log
from arvideo_ds.config import PretrainRecipe
from arvideo_ds.errors import UserError, command
from arvideo_ds.evaluation.probes import DEFAULT_PROBES, PROBES, open_probe_shards
from arvideo_ds.runs import run_folder


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
        type=parse_set,
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
    text = "attentive probe; default none"
    parser.add_argument("--attentive", type=int, default=0, metavar="EPOCHS", help=text)
    args = parser.parse_args()
    require_at_least(0, args, "attentive")
    recipe = run_folder.read_recipe(args.run, PretrainRecipe)
    from arvideo_ds.evaluation.probing import AttentiveProbe, in_words, probe_run

    probes = {
        name: PROBES.choose(name, key="--probe")() for name in (*DEFAULT_PROBES, *args.probes)
    }
    if args.attentive:
        probes["attentive_probe"] = AttentiveProbe(args.attentive)

    words: list[str] = []

    def probe(*folders: str | None) -> dict[str, Any]:
        train, test = open_probe_shards(recipe.probe, *folders)
        log(f"probing {args.run}: train {train.name}, test {test.name}")
        results = probe_run(args.run, recipe, train, test, probes)
        words.append(f"{test.name}: {in_words(results)}")
        return results

    sets = dict(args.sets)
    # With --set alone, the recipe's shards are not probed.
    results = probe(args.train, args.test) if not sets or args.train or args.test else {}
    more = {name: probe(*pair) for name, pair in sets.items()}
    if more:
        results["probes"] = more
    run_folder.update_summary(args.run, results)
    print(json.dumps(results, indent=1))
    for line in words:
        log(line)


def parse_set(text: str) -> tuple[str, tuple[str, str]]:
    name, _, folders = text.partition("=")
    pair = folders.split(",")
    if not name or len(pair) != 2 or not all(pair):
        raise UserError(f"--set {text} must be NAME=TRAIN,TEST.")
    return name, (pair[0], pair[1])
