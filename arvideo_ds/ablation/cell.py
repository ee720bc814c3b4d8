"""One cell of a grid: a variant, a fold and a seed, trained and judged in a folder of its own.

<output>/cells/<variant>-seed<n>/   a run's folder (runs/run_folder.py; with several folds
                                    <variant>-fold<k>-seed<n>), and
  log.txt      its output, over all its starts
  result.json  its measures; a cell that has one is finished
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arvideo_ds.ablation.grid import UNTRAINED, GridPlan, Variant
from arvideo_ds.ablation.judges import judge_of
from arvideo_ds.config import Recipe, load_recipe
from arvideo_ds.engine.launcher import planned_world_size
from arvideo_ds.errors import EXIT_OK, UserError
from arvideo_ds.files.atomic import write_json
from arvideo_ds.files.locks import lock
from arvideo_ds.planning.cost import cost_of
from arvideo_ds.runs import run_folder
from arvideo_ds.tasks import task_of
from arvideo_ds.train.settle import RunOptions, settle

CELLS, LOG, RESULT = "cells", "log.txt", "result.json"


@dataclass(frozen=True)
class Cell:
    folder: Path
    variant: str
    recipe: str
    # Including the seed.
    overrides: tuple[str, ...]
    seed: int
    probe_videos: tuple[int, int] | None
    deepspeed_config: Path
    # The number of the pair of shards that it trains and tests on.
    fold: int = 0

    @property
    def trained(self) -> bool:
        return self.variant != UNTRAINED

    @property
    def name(self) -> str:
        return self.folder.name

    def settings(self) -> Recipe:
        return load_recipe(self.recipe, self.overrides, Recipe)

    def sources(self) -> dict[str, str | None]:
        """Its token scores or initial weights. Errors: as `Probing.sources`."""
        recipe = self.settings()
        return judge_of(recipe).sources(recipe) if self.trained else {"scores": None}

    def figures(self) -> dict[str, float]:
        """The measures of a finished cell."""
        result, recipe = self.result() or {}, self.settings()
        return {key: result[key] for key in judge_of(recipe).measures(recipe)}

    def result(self) -> dict[str, Any] | None:
        """The content of result.json; None for an unfinished cell."""
        path = self.folder / RESULT
        return json.loads(path.read_text()) if path.is_file() else None


def cells_of(
    plan: GridPlan,
    *,
    seeds: int,
    output: Path,
    deepspeed_config: Path,
    overrides: tuple[str, ...],
    folds: Sequence[tuple[str, ...]] = ((),),
) -> list[Cell]:
    """All variants with the first seed, then with the next; first the untrained encoder, if any.

    folds: the words that name the shards of each fold; those of the first are among `overrides`.
    `{fold}` and `{seed}` in an override are replaced by the cell's numbers.
    """
    variants = list(plan.variants)
    if judge_of(plan.base).untrained:
        words = (*plan.grid.overrides, *overrides)
        variants.insert(0, Variant(UNTRAINED, plan.grid.base, words, plan.base))
    return [
        Cell(
            folder=output / CELLS / _folder_name(variant, fold, seed, len(folds)),
            variant=variant.name,
            recipe=variant.recipe,
            overrides=(
                *numbered(in_fold(variant.overrides, folds[0], shards), fold, seed),
                *overrides_of_seed(variant, output, seed),
            ),
            seed=seed,
            probe_videos=plan.grid.probe_videos,
            deepspeed_config=deepspeed_config,
            fold=fold,
        )
        for seed in range(seeds)
        for fold, shards in enumerate(folds)
        for variant in variants
    ]


def numbered(overrides: Sequence[str], fold: int, seed: int) -> tuple[str, ...]:
    """The overrides with `{fold}` and `{seed}` replaced."""
    return tuple(
        word.replace("{fold}", str(fold)).replace("{seed}", str(seed)) for word in overrides
    )


def in_fold(
    overrides: Sequence[str], first: Sequence[str], shards: Sequence[str]
) -> tuple[str, ...]:
    """The overrides with the shards of the first fold replaced; the order decides which wins."""
    instead = dict(zip(first, shards, strict=True))
    return tuple(instead.get(word, word) for word in overrides)


def _folder_name(variant: Variant, fold: int, seed: int, folds: int) -> str:
    return "-".join([variant.name, *([f"fold{fold}"] if folds > 1 else []), f"seed{seed}"])


def overrides_of_seed(variant: Variant, output: Path, seed: int) -> list[str]:
    """The seed, and one group of W&B for all seeds of a variant, unless the recipe has a group."""
    overrides, wandb = [f"train.seed={seed}"], variant.settings.wandb
    if wandb.settled().mode != "disabled" and wandb.group is None:
        tags = [*wandb.tags, output.name, variant.name, f"seed {seed}"]
        overrides.append(f"wandb.group={json.dumps(f'{output.name}/{variant.name}')}")
        overrides.append(f"wandb.tags={json.dumps(tags)}")
    return overrides


def require_same(cell: Cell, data: dict[str, Any]) -> None:
    """Errors: `UserError` where the cell's settings or data differ, or token scores are missing."""
    recipe = task_of(cell.settings()).settled(cell.folder)
    run_folder.require_same_mathematics(cell.folder, recipe)
    now, result = {**data, **cell.sources()}, cell.result()
    changed = [key for key in now if result is not None and result["data"].get(key) != now[key]]
    if changed:
        raise UserError(
            f"{cell.folder} was finished with other {', '.join(changed)} than this command's. Use "
            "the same data, or start another grid with another --output."
        )


def run_cell(cell: Cell) -> int:
    """Train unless trained, then measure, on every rank; returns the exit code."""
    options = RunOptions(cell.recipe, cell.deepspeed_config, cell.overrides, cell.folder)
    settings = settle(options, Recipe, world_size=planned_world_size())
    settings.require_shards()
    recipe = settings.recipe
    if cell.trained and not (cell.folder / run_folder.MODEL).is_file():
        from arvideo_ds.train.run import start

        code = start(settings)
        if code != EXIT_OK:
            return code
    # An untrained cell starts no process group: only srun's variables give the rank.
    if int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0")) == 0:
        with lock(cell.folder):
            run_folder.write_recipe(cell.folder, recipe)
            judge = judge_of(recipe)
            result = {**judge.result(cell, recipe), **_costs(cell, recipe)}
            data, _ = judge.data(recipe, cell.probe_videos)
            write_json(cell.folder / RESULT, {**result, "data": {**data, **cell.sources()}})
    return EXIT_OK


def _costs(cell: Cell, recipe: Recipe) -> dict[str, Any]:
    cost, phases = cost_of(recipe), zip(recipe.phase_shares, recipe.by_phase(), strict=True)
    costs = ((share, cost_of(phase)) for share, phase in phases)
    flops = sum(n * (c.flops_forward_per_clip + c.flops_teacher_per_clip) for n, c in costs)
    logged = run_folder.read_metrics(cell.folder)
    times = [metrics["time/step_s"] for metrics in logged]
    ends = [0, *(metrics["step"] for metrics in logged)]
    seconds = [n * (b - a) for n, (a, b) in zip(times, itertools.pairwise(ends), strict=True)]
    return {
        # The median: the first logged interval includes the warm-up.
        "seconds_per_step": round(statistics.median(times), 4) if times else None,
        # Without saves, validations and starts.
        "minutes": round(sum(seconds) / 60, 3) if times else None,
        "gflops_forward_per_clip": round(flops / 1e9, 4),
        "parameters": cost.parameters_encoder + cost.parameters_decoder,
    }
