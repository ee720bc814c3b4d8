"""What a run reports about itself: facts in its files, the printed header and summary."""

from __future__ import annotations

import dataclasses
import platform
from importlib import metadata
from typing import Any

from arvideo_ds.engine.resolve import zero_stage
from arvideo_ds.engine.world import World
from arvideo_ds.long_video.score_store import hash_of_scores
from arvideo_ds.planning.plan import RunPlan, notes
from arvideo_ds.runs.run_folder import update_summary
from arvideo_ds.shards.manifest import ShardSet
from arvideo_ds.train.baseline import BASELINE
from arvideo_ds.train.loop import Outcome
from arvideo_ds.train.settle import Options, Settings
from arvideo_ds.version import git_commit

# In summary.json: whether the last logged loss is below `BASELINE`.
BELOW_BASELINE = "below_baseline"
_PACKAGES = ("torch", "deepspeed", "timm", "webdataset", "decord", "torchcodec", "av", "numpy")


def facts(settings: Settings[Any], shards: ShardSet, world_size: int) -> dict[str, Any]:
    """Saved with every checkpoint: what it is, and what it needs to be resumed."""
    return {
        **settings.as_dict(),
        "world_size": world_size,
        "zero_stage": zero_stage(settings.deepspeed),
        "manifest": shards.hash,
        "scores": hash_of_scores(settings.recipe),
        "commit": git_commit(),
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "absent"
    return versions


def print_header(
    options: Options,
    settings: Settings[Any],
    shards: ShardSet,
    world: World,
    decoder: str,
    first_step: int,
) -> None:
    plan, recipe, task = settings.plan, settings.recipe, settings.task
    print(
        f"recipe {options.recipe}: {task.model_words()}, {_parameters(plan)}, "
        f"{plan.gflops_forward_per_clip:.2f} GFLOP forward per clip\n"
        f"clip {plan.clip_shape} -> tokens {plan.token_grid}{task.token_words(plan)}\n"
        f"data {shards.name}: {plan.num_videos} videos, decoder {decoder}\n"
        f"{_batch(plan)}\n"
        f"{world.size} rank(s) by {world.launcher} on {world.device.type}, ZeRO stage "
        f"{zero_stage(settings.deepspeed)}, {recipe.train.precision}; writing to {options.folder}"
        + (f"; going on after step {first_step}" if first_step else ""),
        flush=True,
    )
    for note in notes(recipe, plan):
        print(f"note: {note}", flush=True)


def _parameters(plan: RunPlan) -> str:
    decoder = f" + {plan.parameters_decoder / 1e6:.1f} M decoder" if plan.parameters_decoder else ""
    return f"{plan.parameters_encoder / 1e6:.1f} M encoder{decoder} parameters"


def _batch(plan: RunPlan) -> str:
    """Videos and clips per step, and the schedule of the learning rate that follows from them."""
    return (
        f"step {plan.videos_per_step} videos x {plan.repeats} clips = {plan.total_batch} clips = "
        f"{_shares(plan)} x {plan.micro_batch} x {plan.accumulation} accumulated\n"
        f"lr for {plan.videos_per_step} videos per step: warm-up from {plan.warmup_lr:.3e} to "
        f"{plan.lr:.3e}, then down to {plan.min_lr:.3e}; {plan.steps} steps = {plan.epochs:g} "
        f"epochs, {plan.warmup_steps} of warm-up"
    )


def _shares(plan: RunPlan) -> str:
    if plan.sequence_parallel == 1:
        return f"{plan.world_size} rank(s)"
    return f"{plan.data_ranks} group(s) of {plan.sequence_parallel} ranks"


def summarize(
    options: Options,
    settings: Settings[Any],
    shards: ShardSet,
    outcome: Outcome,
    first_step: int,
    elapsed_s: float,
    baseline: float | None = None,
) -> None:
    """Write summary.json and print the outcome. baseline: loss of predicting the mean, if known."""
    folder = options.folder
    loss = outcome.metrics.get(f"loss/{settings.recipe.task}")
    below = None if baseline is None or loss is None else loss < baseline
    update_summary(
        folder,
        {
            "recipe": options.recipe,
            "steps": outcome.steps,
            "interrupted": outcome.interrupted,
            "resumed_from_step": first_step,
            "train_seconds_of_last_start": round(elapsed_s, 1),
            **({"final": outcome.metrics} if outcome.metrics else {}),
            **({} if below is None else {BASELINE: baseline, BELOW_BASELINE: below}),
            "manifest": shards.hash,
            "plan": dataclasses.asdict(settings.plan),
            "commit": git_commit(),
        },
    )
    done = f"{outcome.steps} of {settings.plan.steps} steps, {elapsed_s / 60:.1f} min"
    if outcome.interrupted:
        print(f"interrupted after {done}; saved. The same command goes on from there.", flush=True)
    elif first_step == settings.plan.steps:
        print(f"nothing left to do: {folder} holds the finished run.", flush=True)
    else:
        print(f"finished {done}: loss {loss:.4f}; see {folder / 'summary.json'}", flush=True)
    if below is False:
        print(f"note: {not_below(loss, baseline)}", flush=True)


def not_below(loss: float | None, baseline: float | None) -> str:
    """In words, that a run has not learnt anything yet."""
    return (
        f"the loss ({loss:.4f}) has not fallen below that of predicting the mean "
        f"({baseline:.4f}): the model has learnt nothing yet."
    )
