"""Model soups: the mean of the weights of models fine-tuned from the same pretrained weights.

Source: Wortsman et al. 2022, arXiv 2203.05482.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arvideo_ds.config import FinetuneRecipe
from arvideo_ds.data.loader import worker_count
from arvideo_ds.errors import UserError
from arvideo_ds.evaluation.pretrained import load_classifier
from arvideo_ds.evaluation.scores import score_videos
from arvideo_ds.files.tensors import save_tensors
from arvideo_ds.host import available_cores
from arvideo_ds.models.classifier import Classifier
from arvideo_ds.runs import run_folder
from arvideo_ds.shards.manifest import ShardSet, require_same_labels

State = dict[str, Tensor]


def write_soup(
    runs: Sequence[Path], recipes: Sequence[FinetuneRecipe], output: Path, where: str | None
) -> dict[str, Any]:
    """Write the mean of fine-tuned runs as a run folder; returns its members and its kind.

    where: labelled shards to choose the members on, greedily; None: all are members. Errors:
    `UserError` where the runs differ in their pretrained weights, model or classes.
    """
    _require_alike(runs, recipes)
    loaded = [load_classifier(r, run) for r, run in zip(recipes, runs, strict=True)]
    model, labels = loaded[0]
    for run, (_, others) in zip(runs, loaded, strict=True):
        require_same_labels(str(runs[0]), labels, str(run), others)
    states = [each.state_dict() for each, _ in loaded]
    facts: dict[str, Any] = {"runs": [run.name for run in runs], "kind": "uniform"}
    if where is None:
        state = uniform_soup(states)
    else:
        shards = ShardSet(where)
        classes = shards.manifest.class_names(recipes[0].heads)
        require_same_labels(str(runs[0]), labels, shards.name, classes)
        state, members, best = greedy_soup(states, _scorer(model, recipes[0], shards))
        names = [runs[number].name for number in members]
        facts |= {"kind": "greedy", "members": names, "judged_on": where, "top1": best}
    output.mkdir(parents=True)
    run_folder.write_recipe(output, recipes[0])
    shutil.copyfile(runs[0] / run_folder.LABELS, output / run_folder.LABELS)
    save_tensors(state, output / run_folder.MODEL)
    run_folder.update_summary(output, {"soup": facts})
    return facts


def uniform_soup(states: Sequence[State]) -> State:
    """The mean of all, summed in float64. Errors: `UserError` where names or shapes differ."""
    _require_same_shapes(states)
    return {
        name: torch.stack([state[name].double() for state in states]).mean(0).to(first.dtype)
        for name, first in states[0].items()
    }


def greedy_soup(
    states: Sequence[State], score: Callable[[State], float]
) -> tuple[State, list[int], float]:
    """Add the states from best to worst, each if the mean's score does not fall.

    score: higher is better, on data that the result is not reported on. Returns the soup, the
    numbers of its members in the order of their addition, and its score.
    """
    _require_same_shapes(states)
    alone = [score(state) for state in states]
    first, *others = sorted(range(len(states)), key=lambda number: -alone[number])
    members, best, soup = [first], alone[first], states[first]
    for number in others:
        trial = uniform_soup([states[member] for member in (*members, number)])
        scored = score(trial)
        if scored >= best:
            members, best, soup = [*members, number], scored, trial
    return soup, members, best


def _require_same_shapes(states: Sequence[State]) -> None:
    shapes = [{name: tuple(value.shape) for name, value in state.items()} for state in states]
    for number, other in enumerate(shapes[1:], start=2):
        if other != shapes[0]:
            names = sorted(name for name, _ in other.items() ^ shapes[0].items())
            raise UserError(
                f"model {number} and model 1 differ in {names[0]}; a soup needs equal models."
            )


def _require_alike(runs: Sequence[Path], recipes: Sequence[FinetuneRecipe]) -> None:
    """Errors: `UserError` where pretrained weights or encoders differ, or a run is given twice."""
    if len({run.resolve() for run in runs}) < len(runs):
        raise UserError("a run is named twice; give each run once.")
    expected = _origin(recipes[0])
    for run, recipe in zip(runs, recipes, strict=True):
        for what, value in _origin(recipe).items():
            if value != expected[what]:
                raise UserError(
                    f"{run} has another {what} than {runs[0]} ({value} and {expected[what]}): the "
                    "mean of their weights means nothing."
                )


def _origin(recipe: FinetuneRecipe) -> dict[str, object]:
    """What the members of a soup have in common."""
    start = recipe.finetune.init_from
    return {
        "finetune.init_from": None if start is None else str(Path(start).resolve()),
        "the clip": recipe.geometry.clip,
        "finetune.pooling": recipe.pooling,
        "finetune.pooling_depth": recipe.pooling_depth,
        # Also their order, which is that of the classes.
        "finetune.heads": recipe.heads,
        "model.positions": recipe.model.positions,
        "the grid of the positions": recipe.pretrained_grid,
    }


def _scorer(
    model: Classifier, recipe: FinetuneRecipe, shards: ShardSet
) -> Callable[[State], float]:
    """Top-1 accuracy of weights on the central clips of the shards, in percent."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)

    @torch.no_grad()
    def score(state: State) -> float:
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
