"""What a run reports about itself: facts in its files, the printed header and summary."""

from __future__ import annotations

import contextlib
import platform
from importlib import metadata
from typing import Any

from arvideo_ds.engine.resolve import zero_stage
from arvideo_ds.engine.world import World, emulates_bf16
from arvideo_ds.files.atomic import write_json
from arvideo_ds.long_video.score_store import hash_of_scores
from arvideo_ds.planning.plan import phase_lines, source_lines
from arvideo_ds.runs import run_folder
from arvideo_ds.tasks.teacher import teacher_facts
from arvideo_ds.train.baseline import BASELINE
from arvideo_ds.train.loop import Outcome
from arvideo_ds.train.settle import RunSettings
from arvideo_ds.version import git_commit

# In summary.json: whether the last logged loss is below `BASELINE`.
BELOW_BASELINE = "below_baseline"
_PACKAGES = ("torch", "deepspeed", "timm", "webdataset", "decord", "torchcodec", "av", "numpy")


def facts(settings: RunSettings[Any], world_size: int) -> dict[str, Any]:
    """Facts of a run that are saved with every checkpoint; resuming needs some of them."""
    versions = {"python": platform.python_version(), **dict.fromkeys(_PACKAGES, "absent")}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        **settings.as_dict(),
        "world_size": world_size,
        "zero_stage": zero_stage(settings.deepspeed),
        "manifest": settings.require_shards().hash,
        "scores": hash_of_scores(settings.recipe),
        **teacher_facts(settings.recipe),
        "commit": git_commit(),
        "versions": versions,
    }


def write_start(
    settings: RunSettings[Any], world: World, facts: dict[str, Any], decoder: str, first_step: int
) -> None:
    """Write recipe, facts and labels to the run's folder, and print the header."""
    folder, recipe, plan, task = settings.folder, settings.recipe, settings.plan, settings.task
    shards = settings.require_shards()
    run_folder.write_recipe(folder, recipe)
    run_folder.write_facts(folder, facts)
    if (names := task.labels(shards)) is not None:
        write_json(folder / run_folder.LABELS, names)
    print(
        f"{settings.in_words()}\n"
        f"{world.size} rank(s) by {world.launcher} on {world.device.type}, {_stage(settings)}, "
        f"{recipe.train.precision}, decoder {decoder}; writing to {folder}"
        + (f"; going on after step {first_step}" if first_step else ""),
        flush=True,
    )
    notes = settings.notes()
    if recipe.train.precision == "bf16" and emulates_bf16(world.device):
        notes.append(
            "this CPU computes bf16 in software, which takes many times as long as fp32. Start "
            "another run with train.precision=fp32."
        )
    for line in source_lines(plan) + phase_lines(plan) + [f"note: {note}" for note in notes]:
        print(line, flush=True)


def _stage(settings: RunSettings[Any]) -> str:
    stage, given = zero_stage(settings.deepspeed), settings.given_stage
    return f"ZeRO stage {stage}" + ("" if stage == given else f" in place of stage {given}")


def summarize(
    settings: RunSettings[Any],
    outcome: Outcome,
    first_step: int,
    elapsed_s: float,
    baseline: float | None = None,
) -> str:
    """Write summary.json; the outcome in words. baseline: loss of predicting the mean, if known."""
    folder = settings.folder
    loss = outcome.metrics.get(f"loss/{settings.recipe.task}")
    below = None if baseline is None or loss is None else loss < baseline
    run_folder.update_summary(
        folder,
        {
            "recipe": settings.options.recipe,
            "steps": outcome.steps,
            "interrupted": outcome.interrupted,
            "resumed_from_step": first_step,
            "train_seconds_of_last_start": round(elapsed_s, 1),
            **({"final": outcome.metrics} if outcome.metrics else {}),
            **({} if below is None else {BASELINE: baseline, BELOW_BASELINE: below}),
            "manifest": settings.require_shards().hash,
            "plan": settings.plan.as_dict(),
            "commit": git_commit(),
        },
    )
    done = f"{outcome.steps} of {settings.plan.steps} steps, {elapsed_s / 60:.1f} min"
    if outcome.interrupted:
        words = f"interrupted after {done}; saved. The same command continues it."
    elif first_step == settings.plan.steps:
        words = f"nothing left to do: {folder} contains the finished run."
    else:
        words = f"finished {done}: loss {loss:.4f}; see {folder / run_folder.SUMMARY}"
    return words if below is not False else f"{words}\nnote: {not_below(loss, baseline)}"


def not_below(loss: float | None, baseline: float | None) -> str:
    """The note on a run that has not learnt anything yet."""
    return (
        f"the loss ({loss:.4f}) has not fallen below that of predicting the mean "
        f"({baseline:.4f}): the model has learnt nothing yet."
    )
