"""Everything that is decided before the first process talks to another; needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arvideo_ds.config import Recipe, RunPlan, load_recipe, make_plan
from arvideo_ds.data.manifest import MANIFEST, ShardSet
from arvideo_ds.engine.resolve import read_deepspeed_json, resolve
from arvideo_ds.errors import UserError


@dataclass(frozen=True)
class Options:
    """The command line of a pretraining run."""

    recipe: str
    deepspeed_config: Path
    overrides: Sequence[str] = ()
    output: Path | None = None
    resume: Path | None = None

    @property
    def folder(self) -> Path:
        return self.output or Path("runs") / Path(self.recipe).stem


@dataclass(frozen=True)
class Settings:
    """A run, decided: `--dry_run` prints it."""

    recipe: Recipe
    plan: RunPlan
    deepspeed: dict[str, Any]
    shards: ShardSet | None

    def require_shards(self) -> ShardSet:
        """The shards. Errors: `UserError` with the command that makes them."""
        return _require(self.recipe, self.shards)

    def as_dict(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "plan": self.plan.as_dict(),
            "deepspeed": self.deepspeed,
        }


def settle(options: Options, *, world_size: int) -> Settings:
    """Recipe, plan and DeepSpeed configuration, resolved against each other.

    Missing shards are no error yet (a dry run needs none): the plan then counts with
    data.num_videos. Errors: `UserError`.
    """
    recipe = load_recipe(options.recipe, options.overrides)
    if options.folder.exists() and not options.folder.is_dir():
        raise UserError(f"--output {options.folder} is a file; give a folder.")
    shards = _open_shards(recipe)
    if shards is None and recipe.data.num_videos is None:
        _require(recipe, shards)
    plan = make_plan(
        recipe, world_size=world_size, num_videos=None if shards is None else shards.num_samples
    )
    tree = read_deepspeed_json(options.deepspeed_config)
    config = resolve(tree, recipe, plan, str(options.deepspeed_config))
    return Settings(recipe, plan, config, shards)


def _open_shards(recipe: Recipe) -> ShardSet | None:
    where = recipe.data.shards
    if where is None or not ("://" in where or (Path(where) / MANIFEST).exists()):
        return None
    return ShardSet(where)


def _require(recipe: Recipe, shards: ShardSet | None) -> ShardSet:
    if shards is not None:
        return shards
    where = recipe.data.shards
    missing = "the recipe names no shards" if where is None else f"there are no shards in {where}"
    raise UserError(
        f"{missing}. Make them with: python data_tools/make_shards.py --dataset folder --videos "
        f"VIDEOS --output {where or 'SHARDS'}"
        + ("; then add data.shards=SHARDS to the command." if where is None else "")
    )
