#!/usr/bin/env python3
"""Is the pretraining worth something? The same fine-tuning with and without it, over seeds.

    python scripts/compare_finetuning.py --recipe finetune_weizmann --init-from RUN --seeds 3 \\
        --output runs/weizmann data.shards=SHARDS/train evaluation.shards=SHARDS/test

Runs scripts/finetune.py and scripts/evaluate.py for each seed, with the last weights, so that none
are chosen on the test videos; the same command goes on where it was interrupted: a signal goes on
to the running programs, which save, and the exit code is 75 once they have ended. Writes
OUTPUT/comparison.json, prints a table, and draws the confusion matrices summed over the seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from arvideo_ds.ablation.cell import group_of_seeds
from arvideo_ds.ablation.ranking import Spread
from arvideo_ds.arguments import CommandParser
from arvideo_ds.config import FinetuneRecipe, load_recipe
from arvideo_ds.errors import UserError, command
from arvideo_ds.host import available_cores
from arvideo_ds.train.signals import Children

SCRIPTS = Path(__file__).parent
STARTS = ("pretrained", "scratch")


@command
def main() -> int:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--init-from", required=True, help="pretrained weights")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; default 1")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    for name in ("seeds", "jobs"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)} must be 1 or more.")
    runs = [(start, seed) for seed in range(args.seeds) for start in STARTS]
    # Threads only wait for their processes.
    with Children() as children, ThreadPoolExecutor(args.jobs) as pool:
        running = [pool.submit(_train_and_test, children, args, *run) for run in runs]
        wait(running, return_when=FIRST_EXCEPTION)
        pool.shutdown(cancel_futures=True)  # after an error or an interruption none begins
        found = [run.result() for run in running]
    results = {
        start: [result for (of, _), result in zip(runs, found, strict=True) if of == start]
        for start in STARTS
    }
    table = {start: _spread(found) for start, found in results.items()}
    _write(args, table, results)
    return 0


def _train_and_test(
    children: Children, args: argparse.Namespace, start: str, seed: int
) -> dict[str, Any]:
    folder = args.output / f"{start}-{seed}"
    more = [f"--init-from={args.init_from}"] if start == "pretrained" else []
    options = [f"--recipe={args.recipe}", f"--output={folder}", f"train.seed={seed}"]
    recipe = load_recipe(args.recipe, args.overrides, FinetuneRecipe)
    more += group_of_seeds(recipe, args.output, start, seed)
    _run(children, args.jobs, "finetune.py", *options, *more, *args.overrides)
    _run(children, args.jobs, "evaluate.py", str(folder), "--weights=last")
    return _result(folder)


def _run(children: Children, jobs: int, script: str, *arguments: str) -> None:
    # Threads of several runs on the same cores would only wait for each other.
    threads = {} if jobs == 1 else {"OMP_NUM_THREADS": str(max(1, len(available_cores()) // jobs))}
    command = [sys.executable, str(SCRIPTS / script), *arguments]
    code = children.run(command, env={**os.environ, **threads})
    if code:
        raise UserError(f"{script} ended with code {code}; its own words stand above.")


def _result(folder: Path) -> dict[str, Any]:
    newest = max((folder / "evaluation").glob("*-last-*.json"), key=lambda p: p.stat().st_mtime)
    result: dict[str, Any] = json.loads(newest.read_text())
    return result | {"scores": str(newest.with_suffix(".safetensors"))}


def _spread(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Of several label sets (finetune.heads) all labels together, and each set alone beside."""
    sets = found[0].get("label_sets", {})
    alone = {name: _of_seeds([result["label_sets"][name] for result in found]) for name in sets}
    return {
        **_of_seeds(found),
        "videos": found[0]["videos"],
        **({"label_sets": alone} if alone else {}),
    }


def _of_seeds(found: list[dict[str, Any]]) -> dict[str, Any]:
    top1 = Spread(tuple(result["top1"] for result in found))
    return {"top1": top1.values, "mean": top1.mean, "deviation": top1.deviation}


def _write(
    args: argparse.Namespace, table: dict[str, Any], results: dict[str, list[dict[str, Any]]]
) -> None:
    # Only now: torch takes seconds to load.
    from matplotlib import pyplot as plt
    from safetensors.torch import load_file

    from arvideo_ds.evaluation.confusion import draw_confusion
    from arvideo_ds.evaluation.scores import Scores

    for start, found in results.items():
        for place, (name, classes) in enumerate(_sets(found[0]).items()):
            dash = f"-{name}" if name else ""
            total: Any = 0
            for result in found:
                held = load_file(result["scores"])
                labels = held["labels"].view(len(held["labels"]), -1)[:, place]
                scores = Scores(held[f"probabilities{dash}"], labels, held["valid"], [])
                total = total + scores.confusion()
            figure = draw_confusion(total, list(classes["per_class"]))
            figure.savefig(args.output / f"confusion-{start}{dash}.png", dpi=110)
            plt.close(figure)
    document = {
        "recipe": args.recipe,
        "seeds": args.seeds,
        "overrides": args.overrides,
        "manifest": results["scratch"][0]["manifest"],
        "starts": table,
    }
    (args.output / "comparison.json").write_text(json.dumps(document, indent=1) + "\n")
    print("| start | top-1 of each seed, % | mean | deviation |\n|---|---|---|---|")
    for start, row in table.items():
        print(_line(start, row))
        for name, alone in row.get("label_sets", {}).items():
            print(_line(f"{start}, {name}", alone))


def _sets(result: dict[str, Any]) -> dict[str, Any]:
    """What was found in each label set; of one label alone the set ''."""
    sets: dict[str, Any] = result.get("label_sets", {"": result})
    return sets


def _line(what: str, row: dict[str, Any]) -> str:
    each = ", ".join(f"{value:.1f}" for value in row["top1"])
    deviation = "" if row["deviation"] is None else f"{row['deviation']:.1f}"
    return f"| {what} | {each} | {row['mean']:.1f} | {deviation} |"


if __name__ == "__main__":
    sys.exit(main())
