"""The folder of a run: its files, its recipe and its results.

<output>/
  recipe.yaml        the whole recipe with overrides
  run.json           plan, DeepSpeed configuration, versions, commit, manifest hash; the parent run
                     (lineage.py), the loss of predicting the mean (baseline.py), the initial
                     weights, the teacher
  metrics.jsonl      one object per logged step
  quarantine-rank-00003.jsonl   videos that did not decode on this rank
  not_applied-rank-00003.jsonl  refused steps, with this rank's videos (guard.py)
  heartbeats/        the current phase of each rank (heartbeat.py)
  failures/          what ended each rank (failure.py)
  flight_recorder/   the last collectives of each rank, with train.flight_recorder
  checkpoints/       see engine/checkpoints.py
  model.safetensors  fp32 weights of the finished run, the whole model
  ema.safetensors    their moving average, with ema_decay
  best.safetensors   the weights with the best validation (fine-tuning, detection, tokenizer)
  labels.json        class names, by label set for several heads (fine-tuning)
  summary.json       the results
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from arvideo_ds.config import RECIPES, Recipe
from arvideo_ds.config.load import AnyRecipe, read_yaml, validate
from arvideo_ds.errors import UserError
from arvideo_ds.files.atomic import write_json, write_text
from arvideo_ds.files.json_lines import append_json_lines, read_json_lines
from arvideo_ds.planning.plan import BASE_VIDEOS, RunPlan

CHECKPOINTS = "checkpoints"
RECORDER = "flight_recorder"
METRICS = "metrics.jsonl"
MODEL, EMA_MODEL, BEST_MODEL = "model.safetensors", "ema.safetensors", "best.safetensors"
LABELS = "labels.json"
# The choices of --weights, and why a run may not have them.
WEIGHTS = {"best": BEST_MODEL, "last": MODEL, "ema": EMA_MODEL}
_WHY_NONE = {
    "best": "only a run with evaluation.shards writes it",
    "last": "the run is not finished, or its weights were moved. Continue the run first",
    "ema": "only a run with an ema_decay writes it",
}
# One file per rank: appends of several nodes to one file may mix their lines.
QUARANTINE = "quarantine"
RECIPE, FACTS = "recipe.yaml", "run.json"
SUMMARY = "summary.json"
# Keys of the plan that determine the schedule and follow from the recipe.
_RATES = ("lr", "warmup_lr", "min_lr")
# The file that identifies the output of each command.
_MARKS = {
    RECIPE: "a run",
    "manifest.json": "shards",
    "index.jsonl": "features",
    "scores.json": "token scores",
    "parity.json": "an export",
}

# Settings that may change when a run continues: they change no number beyond rounding.
_FREE = frozenset(
    """data.workers data.prefetch data.prefetch_mib data.decoder data.timeout_s
    data.max_skipped_share data.test_short_side data.shards data.scores data.num_videos
    train.micro_batch train.log_every
    train.save_every train.keep_checkpoints train.max_refused_steps train.stall_s train.compile
    train.flight_recorder train.grad_dtype train.peak_tflops optim.implementation
    evaluation.shards evaluation.every_epochs
    evaluation.views evaluation.batch evaluation.annotations evaluation.detections
    evaluation.min_score evaluation.excluded evaluation.action_list evaluation.short_side
    evaluation.extend evaluation.person_score finetune.init_from finetune.num_classes
    finetune.teacher detect.init_from detect.annotations pretrain.init_from objective.teacher
    tokenizer.perceptual_network
    probe.train_shards probe.test_shards probe.every_epochs wandb.mode wandb.project wandb.entity
    wandb.group wandb.tags trackers.tensorboard trackers.trackio""".split()
)
# Settings that may also differ from the parent of --resume: length, speed and evaluation.
_FREE_OF_PARENT = (
    "train.epochs",
    "train.max_steps",
    "train.precision",
    "train.tf32",
    "optim.",
    "probe.",
)


def write_recipe(folder: Path, recipe: Recipe) -> None:
    write_text(folder / RECIPE, yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))


def require_own(folder: Path, mark: str) -> None:
    """Errors: `UserError` for a file, or the output of a command without the file `mark`."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file; give a folder.")
    for name, what in _MARKS.items():
        if name != mark and (folder / name).is_file():
            raise UserError(f"--output {folder} contains {what} ({name}); choose another folder.")


def choose_weights(folder: Path, name: str | None = None) -> str:
    """A key of `WEIGHTS`: `name`, else best if the run has it, else last.

    Errors: `UserError` if the run does not have the file.
    """
    name = name or ("best" if (folder / BEST_MODEL).is_file() else "last")
    if not (folder / WEIGHTS[name]).is_file():
        raise UserError(f"there is no {folder / WEIGHTS[name]}: {_WHY_NONE[name]}.")
    return name


def read_recipe(folder: Path, kind: type[AnyRecipe]) -> AnyRecipe:
    """The recipe of a run; kind: its class or a base. Errors: `UserError` for another kind."""
    path = folder / RECIPE
    names = [recipe.run_name for recipe in RECIPES.values() if issubclass(recipe, kind)]
    expected = "a run" if len(names) == len(RECIPES) else " or ".join(names)
    if not path.is_file():
        raise UserError(
            f"expected {expected}, but {folder} has no {RECIPE}. Give the folder of a run; by "
            "default runs are in runs/."
        )
    tree = read_yaml(path)
    task = str(tree.get("task", "pretrain")) if isinstance(tree, dict) else ""
    if task in RECIPES and not issubclass(RECIPES[task], kind):
        actual = RECIPES[task]
        raise UserError(
            f"expected {expected}, but {folder} is {actual.run_name}; such runs are tested with "
            f"`arvideo {actual.tested_by}`."
        )
    return validate(tree, str(path), kind)


def require_same_mathematics(folder: Path, recipe: Recipe) -> None:
    """Errors: `UserError` if the folder has a run whose recipe gives other numbers."""
    if not (folder / RECIPE).is_file():
        return
    if changed := _changed(read_recipe(folder, Recipe), recipe):
        raise UserError(
            f"{folder} contains a run with other settings ({_listed(changed)}). Continue with the "
            "original settings, or start another run with another --output."
        )


def require_resumable(parent: Path, recipe: Recipe) -> None:
    """Errors: `UserError` if the parent run has another model, objective, clips or order.

    Its weights would have other positions or targets, and its step another place in the data.
    """
    changed = {
        key: values
        for key, values in _changed(read_recipe(parent, type(recipe)), recipe).items()
        # Another optimiser cannot read this one's moments.
        if key == "optim.name" or not key.startswith(_FREE_OF_PARENT)
    }
    if changed:
        raise UserError(
            f"--resume {parent}: that run had other settings ({_listed(changed)}), and "
            "a resumed run keeps model, objective, clips, batch and order of its parent; length "
            "(train.epochs, train.max_steps), optim.* except its name, train.precision, train.tf32 "
            "and probe.* may differ. Give the parent's values. To pretrain the parent's encoder "
            "on other videos, on clips of another shape or with another objective, or to fine-tune "
            f"it, start a run with --init-from {parent} in place of --resume."
        )


def _changed(before: Recipe, now: Recipe) -> dict[str, tuple[Any, Any]]:
    """Both values of every setting that differs and changes numbers."""
    was, is_now = _flat(before), _flat(now)
    return {
        key: (was.get(key), value)
        for key, value in is_now.items()
        if key not in _FREE and was.get(key) != value
    }


def _flat(recipe: Recipe) -> dict[str, Any]:
    sections = recipe.model_dump(mode="json", exclude={"task"})
    phases = sections.pop("phases", [])
    flat = {f"{s}.{key}": value for s, keys in sections.items() for key, value in keys.items()}
    # train.micro_batch is free.
    flat["phases"] = [{**phase, "train": phase["train"]["total_batch"]} for phase in phases]
    if recipe.data.sources is not None:
        free = {"shards", "num_videos"}  # as data.shards
        sources = [s.model_dump(mode="json", exclude_none=True) for s in recipe.data.sources]
        flat["data.sources"] = [{k: v for k, v in s.items() if k not in free} for s in sources]
    return {"task": recipe.task, **flat}


def _listed(changed: Mapping[str, tuple[Any, Any]]) -> str:
    shown = [f"{key} was {was!r}, is {now!r}" for key, (was, now) in list(changed.items())[:5]]
    more = [f"and {len(changed) - 5} more"] if len(changed) > 5 else []
    return "; ".join(shown + more)


def excluded_videos(folder: Path) -> dict[str, str]:
    """Keys of videos on which data workers hung or crashed in earlier starts -> hang or crash."""
    return {
        line["key"]: line["kind"]
        for line in read_of_ranks(folder, QUARANTINE)
        if line.get("kind") in ("hang", "crash") and "key" in line
    }


def append_of_rank(folder: Path, name: str, rank: int, lines: Iterable[Mapping[str, Any]]) -> None:
    """Append to this rank's own file."""
    append_json_lines(folder / f"{name}-rank-{rank:05d}.jsonl", lines)


def read_of_ranks(folder: Path, name: str) -> list[dict[str, Any]]:
    """The lines of all ranks, also from the only file of earlier versions."""
    paths = [folder / f"{name}.jsonl", *sorted(folder.glob(f"{name}-rank-*.jsonl"))]
    return [line for path in paths for line in read_json_lines(path)]


def write_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write run.json."""
    write_json(folder / FACTS, facts)


def read_facts(folder: Path) -> dict[str, Any]:
    """The content of run.json, empty without the file."""
    return _read_json(folder / FACTS)


def read_summary(folder: Path) -> dict[str, Any]:
    """summary.json. Errors: `UserError` if there is none yet."""
    if not (folder / SUMMARY).is_file():
        raise UserError(
            f"there is no {folder / SUMMARY}: it is written when the run finishes or is "
            "interrupted. Continue the run first."
        )
    return _read_json(folder / SUMMARY)


def update_summary(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Add facts to summary.json and return the whole."""
    summary = _read_json(folder / SUMMARY) | dict(facts)
    write_json(folder / SUMMARY, summary)
    return summary


def _read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def has_checkpoints(folder: Path) -> bool:
    """Whether the run has any checkpoint, complete or not (engine/checkpoints.py)."""
    return any((folder / CHECKPOINTS).glob("step-*"))


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The logged steps without damaged lines (json_lines.py)."""
    return [line for line in read_json_lines(folder / METRICS) if "step" in line]


def require_same_rates(checkpoint: Path, before: Any, plan: RunPlan) -> None:
    """Errors: `UserError` if the checkpoint's plan has other learning rates from the same recipe.

    Version 0.1 first scaled base_lr by clips, and not warmup_lr and min_lr.
    """
    was = before if isinstance(before, Mapping) else {}
    changed = [k for k in _RATES if k in was and not math.isclose(was[k], getattr(plan, k))]
    if changed:
        listed = ", ".join(f"{k} was {was[k]:.3g}, is {getattr(plan, k):.3g}" for k in changed)
        keys = " ".join(
            f"optim.{'base_lr' if k == 'lr' else k}={was[k] * BASE_VIDEOS / plan.videos_per_step:g}"
            for k in changed
        )
        raise UserError(
            f"checkpoint {checkpoint} was trained with other learning rates than this version "
            f"computes from the same recipe ({listed}): rates are now given for {BASE_VIDEOS} "
            f"videos per step. Start another run with the former rates (a pretraining run can "
            f"start from this one with --resume RUN --output NEW): {keys}."
        )
