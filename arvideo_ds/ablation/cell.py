"""One cell of a grid: a variant and a seed, trained and probed in a folder of its own.

<output>/cells/<variant>-seed<n>/   a run's folder (runs/run_folder.py), and
  log.txt      everything it printed, over all its starts
  result.json  what it came to; a cell that has one is finished
"""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arvideo_ds.ablation.grid import UNTRAINED, Plan, Variant
from arvideo_ds.config import PretrainRecipe, Recipe, load_recipe
from arvideo_ds.engine.launcher import planned_world_size
from arvideo_ds.errors import EXIT_OK, UserError
from arvideo_ds.evaluation.probes import DEFAULT_PROBES, PROBES, open_probe_shards
from arvideo_ds.files.atomic import write_json
from arvideo_ds.long_video.score_store import hash_of_scores
from arvideo_ds.planning.cost import cost_of
from arvideo_ds.runs import run_folder
from arvideo_ds.shards.manifest import ShardSet
from arvideo_ds.train.settle import Options, settle

CELLS, LOG, RESULT = "cells", "log.txt", "result.json"


@dataclass(frozen=True)
class Cell:
    folder: Path
    variant: str
    recipe: str
    # The seed is one of them.
    overrides: tuple[str, ...]
    seed: int
    probe_videos: tuple[int, int] | None
    deepspeed_config: Path

    @property
    def trained(self) -> bool:
        return self.variant != UNTRAINED

    @property
    def name(self) -> str:
        return self.folder.name

    def settings(self) -> PretrainRecipe:
        return load_recipe(self.recipe, self.overrides)

    def scores(self) -> str | None:
        """What identifies the token scores that it trains with. Errors: as `hash_of_scores`."""
        return hash_of_scores(self.settings()) if self.trained else None

    def result(self) -> dict[str, Any] | None:
        """What the cell came to, or nothing where it is not finished."""
        path = self.folder / RESULT
        return json.loads(path.read_text()) if path.is_file() else None


def cells_of(
    plan: Plan, *, seeds: int, output: Path, deepspeed_config: Path, overrides: tuple[str, ...]
) -> list[Cell]:
    """The untrained encoder and every variant with the first seed, then all with the next one."""
    untrained = Variant(UNTRAINED, plan.grid.base, (*plan.grid.overrides, *overrides), plan.base)
    return [
        Cell(
            folder=output / CELLS / f"{variant.name}-seed{seed}",
            variant=variant.name,
            recipe=variant.recipe,
            overrides=(
                *variant.overrides,
                f"train.seed={seed}",
                *group_of_seeds(variant.settings, output, variant.name, seed),
            ),
            seed=seed,
            probe_videos=plan.grid.probe_videos,
            deepspeed_config=deepspeed_config,
        )
        for seed in range(seeds)
        for variant in (untrained, *plan.variants)
    ]


def group_of_seeds(recipe: Recipe, output: Path, name: str, seed: int) -> list[str]:
    """Overrides by which W&B shows the seeds of `name` as one group, where it is on.

    A group that the recipe has is kept.
    """
    if recipe.wandb.settled().mode == "disabled" or recipe.wandb.group is not None:
        return []
    tags = [*recipe.wandb.tags, output.name, name, f"seed {seed}"]
    group = f"{output.name}/{name}"
    return [f"wandb.group={json.dumps(group)}", f"wandb.tags={json.dumps(tags)}"]


def judged_on(
    recipe: PretrainRecipe, probe_videos: tuple[int, int] | None
) -> tuple[dict[str, Any], float]:
    """What decides a result beside the recipe, and the accuracy of guessing in percent.

    Errors: `UserError` where shards are missing or do not go together.
    """
    train, test = open_probe_shards(recipe.probe)
    shards = recipe.data.shards
    if shards is None:
        raise UserError("the grid's recipe names no shards to pretrain on; give --train SHARDS.")
    data = {
        "manifest": ShardSet(shards).hash,
        "probe_manifests": [train.hash, test.hash],
        "probe_videos": list(probe_videos or (train.num_samples, test.num_samples)),
        "probe_features": recipe.probe.features,
    }
    return data, 100 / len(train.manifest.labels or "?")


def require_same(cell: Cell, data: dict[str, Any]) -> None:
    """Refuse a folder whose cell has other settings, or other data than it was finished with.

    Errors: `UserError`, also where there are no token scores that it needs.
    """
    run_folder.require_same_mathematics(cell.folder, cell.settings())
    now, result = {**data, "scores": cell.scores()}, cell.result()
    changed = [key for key in now if result is not None and result["data"].get(key) != now[key]]
    if changed:
        raise UserError(
            f"{cell.folder} was finished with other {', '.join(changed)} than this command's. Go "
            "on with the same data, or start another grid with another --output."
        )


def run_cell(cell: Cell) -> int:
    """Train, unless that is done, and probe. Every rank calls it; returns the exit code."""
    options = Options(cell.recipe, cell.deepspeed_config, cell.overrides, cell.folder)
    settings = settle(options, PretrainRecipe, world_size=planned_world_size())
    shards = settings.require_shards()
    if cell.trained and not (cell.folder / run_folder.MODEL).is_file():
        # Only now: torch and DeepSpeed take seconds to load.
        from arvideo_ds.train.run import start

        code = start(options, settings, shards)
        if code != EXIT_OK:
            return code
    # An untrained cell starts no process group, so only srun has said who this is.
    if int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0")) == 0:
        with run_folder.lock(cell.folder):
            run_folder.write_recipe(cell.folder, settings.recipe)
            result = {**_probe(cell, settings.recipe), **_costs(cell, settings.recipe)}
            data, _ = judged_on(settings.recipe, cell.probe_videos)
            data["scores"] = cell.scores()
            write_json(cell.folder / RESULT, {**result, "data": data})
    return EXIT_OK


def _probe(cell: Cell, recipe: PretrainRecipe) -> dict[str, Any]:
    from arvideo_ds.evaluation.features import freeze
    from arvideo_ds.evaluation.pretrained import load_trained_encoder, untrained

    encoder = (
        load_trained_encoder(recipe, cell.folder) if cell.trained else untrained(recipe).encoder
    )
    frozen = freeze(encoder, recipe, *open_probe_shards(recipe.probe), videos=cell.probe_videos)
    return {
        **{
            name.removesuffix("_probe"): round(100 * PROBES[name]().accuracy(frozen), 2)
            for name in DEFAULT_PROBES
        },
        "skipped": sum(features.skipped for features in frozen.features),
    }


def _costs(cell: Cell, recipe: PretrainRecipe) -> dict[str, Any]:
    cost = cost_of(recipe)
    times = [metrics["time/step_s"] for metrics in run_folder.read_metrics(cell.folder)]
    return {
        # Of the logged stretches the middle one: the first holds the warm-up of everything.
        "seconds_per_step": round(statistics.median(times), 4) if times else None,
        "gflops_forward_per_clip": round(cost.flops_forward_per_clip / 1e9, 4),
        "parameters": cost.parameters_encoder + cost.parameters_decoder,
    }
