"""What is decided before ranks talk to each other; needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic

from arvideo_ds.config import Recipe, load_recipe
from arvideo_ds.config.load import AnyRecipe
from arvideo_ds.config.schema import TrackerSettings
from arvideo_ds.engine.resolve import read_deepspeed_json, resolve, sequence_parallel, zero_stage
from arvideo_ds.errors import UserError, how_to_install
from arvideo_ds.long_video.score_store import TokenScores
from arvideo_ds.optim.optimizers import OPTIMIZERS
from arvideo_ds.optim.schedule import SCHEDULES
from arvideo_ds.planning.data import layers_in_words
from arvideo_ds.planning.plan import RunPlan, batch_words, make_plan, notes, schedule_words
from arvideo_ds.runs import run_folder
from arvideo_ds.shards.manifest import ShardSet
from arvideo_ds.shards.mix import AnyShards
from arvideo_ds.shards.synthetic_sets import how_to_make, set_of
from arvideo_ds.shards.video_files import how_to_make_shards
from arvideo_ds.tasks import Task, task_of
from arvideo_ds.tasks.task import open_shards, open_training_shards


@dataclass(frozen=True)
class RunOptions:
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
class RunSettings(Generic[AnyRecipe]):
    """All settings of a run, resolved; `--dry_run` prints them."""

    options: RunOptions
    recipe: AnyRecipe
    plan: RunPlan
    deepspeed: dict[str, Any]
    # Of the DeepSpeed JSON, in whose place a run may use a higher one.
    given_stage: int
    shards: AnyShards | None
    # Of the validation during training.
    validation: ShardSet | None = None

    @property
    def folder(self) -> Path:
        return self.options.folder

    @property
    def task(self) -> Task:
        return task_of(self.recipe)

    def require_shards(self) -> AnyShards:
        """The shards. Errors: `UserError` with the command that makes them."""
        if self.shards is None:
            raise _missing_shards(self.recipe)
        return self.shards

    def in_words(self) -> str:
        """Model, tokens, data, batch and learning rate: the head of a run's output."""
        plan, task = self.plan, self.task
        teacher = plan.gflops_teacher_per_clip
        of_teacher = f" + {teacher:.2f} of the teacher" if teacher else ""
        data = "no shards yet" if self.shards is None else f"data {self.shards.name}"
        return (
            f"recipe {self.options.recipe}: {task.model_words()}, {plan.parameter_words()}, "
            f"{plan.gflops_forward_per_clip:.2f}{of_teacher} GFLOP forward per clip\n"
            f"clip {plan.clip_shape} -> tokens {plan.token_grid}{task.token_words(plan)}\n"
            f"{data}: {plan.num_videos} videos\n"
            f"{batch_words(plan)}\n"
            f"{schedule_words(plan)}"
        )

    def notes(self) -> list[str]:
        """Sentences about settings that may not be intended, and about the shards."""
        lines = notes(self.recipe, self.plan)
        if self.shards is None:
            where = ", ".join(self.recipe.data.folders)
            missing = f"there are no shards in {where} yet" if where else "data.shards is not set"
            lines.append(
                f"{missing}; the plan assumes {self.plan.num_videos} videos (data.num_videos)."
            )
        sets = () if self.shards is None else self.shards.sets
        for shards, recipe in zip(sets, self.recipe.by_source(), strict=False):
            where = f"{shards.name}: " if len(sets) > 1 else ""
            lines += [f"{where}{line}" for line in layers_in_words(recipe.data, shards.layers)]
        return lines

    def as_dict(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "plan": self.plan.as_dict(),
            "deepspeed": self.deepspeed,
        }


def settle(
    options: RunOptions, kind: type[AnyRecipe], *, world_size: int
) -> RunSettings[AnyRecipe]:
    """Recipe (of `kind`), plan and DeepSpeed configuration, checked together.

    Without shards, as in a dry run, data.num_videos gives their number. Errors: `UserError`.
    """
    recipe = load_recipe(options.recipe, options.overrides, kind)
    OPTIMIZERS.check(recipe.optim.name, key="optim.name")
    SCHEDULES.check(recipe.optim.schedule, key="optim.schedule")
    _ = recipe.wandb.settled()  # an error in the environment ends a run before it starts
    _require_packages(recipe.trackers)
    run_folder.require_own(options.folder, run_folder.RECIPE)
    # A run with checkpoints continues from them (preflight.py), and by its own recipe.
    continued = None if run_folder.has_checkpoints(options.folder) else options.resume
    recipe = task_of(recipe).settled(continued or options.folder)
    task = task_of(recipe)
    if continued is not None:
        run_folder.require_resumable(continued, recipe)
    shards = open_training_shards(recipe.data)
    if shards is None and not recipe.data.expects_videos:
        raise _missing_shards(recipe)
    if isinstance(shards, ShardSet) and recipe.data.scores is not None:
        TokenScores(recipe.data.scores).require(shards, recipe)
    tree, origin = read_deepspeed_json(options.deepspeed_config), str(options.deepspeed_config)
    plan = make_plan(
        recipe,
        world_size=world_size,
        num_videos=None if shards is None else shards.videos,
        sequence_parallel=sequence_parallel(tree, origin),
    )
    config = resolve(tree, recipe, plan, origin)
    validation = task.open_validation()
    task.check(plan, shards, validation)
    return RunSettings(options, recipe, plan, config, zero_stage(tree), shards, validation)


def _require_packages(settings: TrackerSettings) -> None:
    """Errors: `UserError` with the command that installs a missing package."""
    for package, value in settings.model_dump().items():
        if value and find_spec(package) is None:
            raise UserError(
                f"trackers.{package}={str(value).lower()} needs the package {package}; "
                f"{how_to_install(package)}. Or remove the key."
            )


def _missing_shards(recipe: Recipe) -> UserError:
    missing = (folder for folder in recipe.data.folders if open_shards(folder) is None)
    where = next(missing, None)
    if where is None:
        return UserError(
            f"the recipe names no shards. {how_to_make_shards('SHARDS')}; then add "
            "data.shards=SHARDS to the command."
        )
    name = set_of(where)
    how = how_to_make_shards(where) if name is None else how_to_make(name)
    return UserError(f"there are no shards in {where}. {how}")
