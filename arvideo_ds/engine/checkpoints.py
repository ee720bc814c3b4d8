"""Checkpoints on disk: complete or not there.

    <run>/checkpoints/
      step-00000500/          renamed to this name only when every rank has written
        ...                   DeepSpeed's own files
        run.json              what was run (step, recipe, plan, versions, ...) and every file's size
      .partial-step-00001000/ a save that was cut off; removed by the next one
      latest                  name of the newest complete checkpoint, replaced atomically

Collective calls are marked; every rank makes them at the same step.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from arvideo_ds.engine.build import Engine
from arvideo_ds.errors import UserError

_PARTIAL, _PREFIX, _MARKER, _LATEST = ".partial-", "step-", "run.json", "latest"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its folder, step, and the facts saved with it."""

    path: Path
    step: int
    facts: dict[str, Any]


def save_checkpoint(
    engine: Engine, folder: Path, step: int, facts: dict[str, Any], *, keep: int
) -> None:
    """Save after `step` optimiser steps, then keep the newest `keep` complete ones. Collective.

    The run stands at position step x videos per step of the data; nothing else about the data is
    state.
    """
    name = f"{_PREFIX}{step:08d}"
    final, partial = folder / name, folder / (_PARTIAL + name)
    if _complete(final) is not None:
        return
    engine.deepspeed.save_checkpoint(str(folder), tag=partial.name, save_latest=False)
    dist.barrier()
    if dist.get_rank() == 0:
        _finish(partial, final, {"step": step, **facts})
        _replace(folder / _LATEST, name)
        _prune(folder, keep)
    dist.barrier()


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint of which every file is there in its full size."""
    for path in sorted(folder.glob(_PREFIX + "*"), reverse=True):
        facts = _complete(path)
        if facts is not None:
            return Checkpoint(path, int(facts["step"]), facts)
    return None


def load_checkpoint(engine: Engine, checkpoint: Checkpoint, *, world_size: int) -> None:
    """Weights, optimiser and loss scale from a checkpoint. Collective.

    Errors: `UserError` when it was saved by another ZeRO stage or number of ranks, which
    DeepSpeed's own files do not allow.
    """
    saved = (checkpoint.facts["world_size"], checkpoint.facts["zero_stage"])
    now = (world_size, engine.stage)
    # Without partitioning (stage 0) the files hold everything, whatever the number of ranks.
    if saved != now and (saved[1], now[1]) != (0, 0):
        raise UserError(
            f"checkpoint {checkpoint.path} was saved by {saved[0]} rank(s) with ZeRO stage "
            f"{saved[1]}; this run has {now[0]} with stage {now[1]}. Resume with the saved "
            "numbers, or start anew with another --output."
        )
    path, _ = engine.deepspeed.load_checkpoint(str(checkpoint.path.parent), checkpoint.path.name)
    if path is None:
        raise UserError(f"DeepSpeed could not load checkpoint {checkpoint.path}.")


def _finish(partial: Path, final: Path, facts: dict[str, Any]) -> None:
    if final.exists():  # a damaged one of the same step
        shutil.rmtree(final)
    files = {
        path.relative_to(partial).as_posix(): path.stat().st_size
        for path in sorted(partial.rglob("*"))
        if path.is_file()
    }
    _replace(partial / _MARKER, json.dumps({**facts, "files": files}, indent=1))
    partial.rename(final)


def _complete(path: Path) -> dict[str, Any] | None:
    try:
        facts: dict[str, Any] = json.loads((path / _MARKER).read_text())
        intact = all((path / name).stat().st_size == size for name, size in facts["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return facts if intact else None


def _prune(folder: Path, keep: int) -> None:
    for path in folder.glob(_PARTIAL + "*"):
        shutil.rmtree(path)
    paths = sorted(folder.glob(_PREFIX + "*"))
    kept = [path for path in paths if _complete(path) is not None][-keep:]
    for path in paths:
        if path not in kept:
            shutil.rmtree(path)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".new")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
