"""The sets of synthetic videos, known by the folders of their shards; imports nothing heavy."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

# Folder, module and name in it of each set.
_SETS = {
    "demo": (Path("data/demo"), "arvideo_ds.shards.demo_set", "DEMO"),
    "events": (Path("data/events"), "arvideo_ds.shards.events_set", "EVENTS"),
}
NAMES = tuple(_SETS)


def set_of(shards: str | None) -> str | None:
    """The set that shards are a split of, by their path; None where they are of none."""
    if shards is None or "://" in shards:
        return None
    above = Path(shards).resolve().parent
    return next((name for name in NAMES if folder_of(name).resolve() == above), None)


def folder_of(name: str) -> Path:
    """Folder of the set, below the current one; its splits are in it."""
    return _SETS[name][0]


def how_to_make(name: str) -> str:
    return f"Make them: arvideo demo --set {name}"


def ensure(name: str) -> None:
    """Make videos and shards of a set where they are missing; one process does, all others wait."""
    # Only now: they need PyAV and a pool of processes.
    from arvideo_ds.shards.synthetic import ensure_shards

    ensure_shards(load(name), folder_of(name))


def load(name: str) -> Any:
    """The `SyntheticSet`."""
    _, module, attribute = _SETS[name]
    return getattr(importlib.import_module(module), attribute)
