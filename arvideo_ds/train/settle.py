"""Everything that is decided before the first process talks to another; needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

from arvideo_ds.config import Recipe, load_recipe
from arvideo_ds.config.load import AnyRecipe
from arvideo_ds.engine.resolve import read_deepspeed_json, resolve, sequence_parallel
from arvideo_ds.errors import UserError
from arvideo_ds.long_video.score_store import TokenScores
from arvideo_ds.optim.optimizers import OPTIMIZERS
from arvideo_ds.planning.plan import RunPlan, make_plan
from arvideo_ds.runs import run_folder
from arvideo_ds.shards.manifest import ShardSet
from arvideo_ds.shards.synthetic_sets import how_to_make, set_of
from arvideo_ds.shards.video_files import how_to_make_shards
from arvideo_ds.tasks import Task, task_of
from arvideo_ds.tasks.task import open_shards


@dataclass(frozen=True)
class Options:
    """The command line of a training run."""

    recipe: str
    deepspeed_config: Path
    overrides: Sequence[str] = ()
    output: Path | None = None
    resume: Path | None = None

    @property
    def folder(self) -> Path:
        return self.output or Path("runs") / Path(self.recipe).stem


@dataclass(frozen=True)
class Settings(Generic[AnyRecipe]):
    """A run, decided: `--dry_run` prints it."""

    recipe: AnyRecipe
    plan: RunPlan
    deepspeed: dict[str, Any]
    shards: ShardSet | None
    # What the validation reads while training.
    validation: ShardSet | None = None

    @property
    def task(self) -> Task:
        return task_of(self.recipe)

    def require_shards(self) -> ShardSet:
        """The shards. Errors: `UserError` with the command that makes them."""
        return _require(self.recipe, self.shards)

    def as_dict(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "plan": self.plan.as_dict(),
            "deepspeed": self.deepspeed,
        }


def settle(options: Options, kind: type[AnyRecipe], *, world_size: int) -> Settings[AnyRecipe]:
    """Recipe (of `kind`), plan and DeepSpeed configuration, resolved against each other.

    Missing shards are no error yet (a dry run needs none): the plan then counts with
    data.num_videos. Errors: `UserError`.
    """
    recipe = load_recipe(options.recipe, options.overrides, kind)
    OPTIMIZERS.check(recipe.optim.name, key="optim.name")
    _ = recipe.wandb.settled()  # an error in the environment ends a run before it starts
    run_folder.require_own(options.folder, run_folder.RECIPE)
    recipe = task_of(recipe).settled(options.folder)
    task = task_of(recipe)
    # Afterwards the run's own checkpoints count (run.py), and so does its own recipe.
    if options.resume is not None and not run_folder.has_checkpoints(options.folder):
        run_folder.require_resumable(options.resume, recipe)
    shards = open_shards(recipe.data.shards)
    if shards is None and recipe.data.num_videos is None:
        _require(recipe, shards)
    if shards is not None and recipe.data.scores is not None:
        TokenScores(recipe.data.scores).require(shards, recipe)
    tree, origin = read_deepspeed_json(options.deepspeed_config), str(options.deepspeed_config)
    plan = make_plan(
        recipe,
        world_size=world_size,
        num_videos=None if shards is None else shards.num_samples,
        sequence_parallel=sequence_parallel(tree, origin),
    )
    config = resolve(tree, recipe, plan, origin)
    validation = task.open_validation()
    task.check(plan, shards, validation)
    return Settings(recipe, plan, config, shards, validation)


def _require(recipe: Recipe, shards: ShardSet | None) -> ShardSet:
    if shards is not None:
        return shards
    where = recipe.data.shards
    if where is None:
        raise UserError(
            f"the recipe names no shards. {how_to_make_shards('SHARDS')}; then add "
            "data.shards=SHARDS to the command."
        )
    name = set_of(where)
    how = how_to_make_shards(where) if name is None else how_to_make(name)
    raise UserError(f"there are no shards in {where}. {how}")
