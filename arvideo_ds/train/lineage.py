"""The runs that a run continues (`--resume`), and the metrics of all of them as one curve."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from arvideo_ds.engine.checkpoints import Checkpoint
from arvideo_ds.runs import run_folder

PARENT = "parent"


def parent_facts(folder: Path, checkpoint: Checkpoint | None) -> dict[str, Any] | None:
    """The entry `PARENT` of run.json for the run in `folder` that resumes from a checkpoint.

    The parent's folder is relative to the run's, so that both can be moved together.
    """
    if checkpoint is None:
        return None
    source = checkpoint.path.parent.parent.resolve()
    if source == folder.resolve():
        return checkpoint.facts.get(PARENT)
    return {"run": os.path.relpath(source, folder.resolve()), "step": checkpoint.step}


def parents(folder: Path) -> list[tuple[Path, int]]:
    """The runs that a run continues, each with its step, nearest first; the last may be gone."""
    chain: list[tuple[Path, int]] = []
    seen = {folder.resolve()}
    while (facts := run_folder.read_facts(folder).get(PARENT)) is not None:
        folder = (folder / facts["run"]).resolve()
        if folder in seen:
            break
        seen.add(folder)
        chain.append((folder, facts["step"]))
    return chain


def curve(folder: Path) -> list[dict[str, Any]]:
    """The logged steps of a run after those of its parents, each up to where its child starts."""
    metrics = run_folder.read_metrics(folder)
    for parent, step in parents(folder):
        before = [m for m in run_folder.read_metrics(parent) if m["step"] <= step]
        first = metrics[0]["step"] if metrics else step + 1
        metrics = [*(m for m in before if m["step"] < first), *metrics]
    return metrics
