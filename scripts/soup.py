#!/usr/bin/env python3
"""Average the weights of several fine-tuned runs that began with the same pretrained weights.

    python scripts/soup.py runs/a runs/b runs/c --output runs/soup
    python scripts/soup.py runs/a runs/b runs/c --output runs/soup --greedy --shards VALIDATION

Greedy: from the best run on, each is added where the mean is no worse with it on --shards (central
clips). The output is a run folder for scripts/evaluate.py, predict.py and export.py.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from arvideo_ds.arguments import CommandParser
from arvideo_ds.config import FinetuneRecipe
from arvideo_ds.errors import UserError, command
from arvideo_ds.host import available_cores
from arvideo_ds.runs import run_folder
from arvideo_ds.shards.manifest import ShardSet, require_same_labels


@command
def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of fine-tuned runs")
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    parser.add_argument("--greedy", action="store_true", help="only what improves the mean")
    parser.add_argument("--shards", help="labelled shards that --greedy judges on")
    args = parser.parse_args()
    if len(args.runs) < 2:
        raise UserError("one run is no soup; give two or more.")
    if args.output.exists():
        raise UserError(f"--output {args.output} is there already; give a new folder.")
    if args.greedy != (args.shards is not None):
        raise UserError("--greedy and --shards go together.")
    recipes = [run_folder.read_recipe(run, FinetuneRecipe) for run in args.runs]
    _require_alike(args.runs, recipes)
    # Only now: torch takes seconds to load.
    from arvideo_ds.evaluation.pretrained import load_classifier
    from arvideo_ds.evaluation.soup import greedy_soup, uniform_soup
    from arvideo_ds.files.tensors import save_tensors

    loaded = [load_classifier(r, run) for r, run in zip(recipes, args.runs, strict=True)]
    for run, (_, labels) in zip(args.runs, loaded, strict=True):
        require_same_labels(str(args.runs[0]), loaded[0][1], str(run), labels)
    states = [model.state_dict() for model, _ in loaded]
    facts: dict[str, Any] = {"runs": [run.name for run in args.runs], "kind": "uniform"}
    if args.greedy:
        shards = ShardSet(args.shards)
        others = shards.manifest.class_names(recipes[0].heads)
        require_same_labels(str(args.runs[0]), loaded[0][1], shards.name, others)
        score = _scorer(loaded[0][0], recipes[0], shards)
        state, members, best = greedy_soup(states, score)
        names = [args.runs[number].name for number in members]
        facts |= {"kind": "greedy", "members": names, "judged_on": args.shards, "top1": best}
    else:
        state = uniform_soup(states)
    args.output.mkdir(parents=True)
    run_folder.write_recipe(args.output, recipes[0])
    shutil.copyfile(args.runs[0] / run_folder.LABELS, args.output / run_folder.LABELS)
    save_tensors(state, args.output / run_folder.MODEL)
    run_folder.update_summary(args.output, {"soup": facts})
    print(json.dumps(facts, indent=1))


def _require_alike(runs: list[Path], recipes: list[FinetuneRecipe]) -> None:
    """One set of pretrained weights, one encoder: else a mean of weights means nothing."""
    if len({run.resolve() for run in runs}) < len(runs):
        raise UserError("a run is named twice; a soup has each run once.")
    first = recipes[0]
    for run, recipe in zip(runs, recipes, strict=True):
        pairs = {
            "finetune.init_from": (_start(recipe), _start(first)),
            "the clip": (recipe.geometry.clip, first.geometry.clip),
            "finetune.pooling": (recipe.pooling, first.pooling),
            # Also their order, in which the classes stand.
            "finetune.heads": (recipe.heads, first.heads),
            "model.positions": (recipe.model.positions, first.model.positions),
            "the grid of the positions": (recipe.pretrained_grid, first.pretrained_grid),
        }
        for what, (its, other) in pairs.items():
            if its != other:
                raise UserError(
                    f"{run} has another {what} than {runs[0]} ({its} and {other}): the mean of "
                    "their weights means nothing."
                )


def _start(recipe: FinetuneRecipe) -> str | None:
    """However the path was written."""
    path = recipe.finetune.init_from
    return None if path is None else str(Path(path).resolve())


def _scorer(model: Any, recipe: FinetuneRecipe, shards: ShardSet) -> Any:
    import torch

    from arvideo_ds.data.loader import worker_count
    from arvideo_ds.evaluation.scores import score_videos

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)

    @torch.no_grad()
    def score(state: dict[str, torch.Tensor]) -> float:
        model.load_state_dict(state)
        scores = score_videos(
            lambda batch: model(batch.clips),
            shards,
            recipe,
            views=(1, 1),
            batch=recipe.evaluation.batch,
            num_workers=worker_count(recipe, cores=len(available_cores())),
            device=device,
            progress=f"judging on {shards.name}",
        )
        return 100 * scores.accuracy()

    return score


if __name__ == "__main__":
    sys.exit(main())
