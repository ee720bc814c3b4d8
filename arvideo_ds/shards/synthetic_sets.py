"""Names and folders of the synthetic sets, without heavy imports."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

# Folder, module and attribute of each set.
_SETS = {
    "demo": (Path("data/demo"), "arvideo_ds.shards.demo_set", "DEMO"),
    "events": (Path("data/events"), "arvideo_ds.shards.events_set", "EVENTS"),
}
NAMES = tuple(_SETS)


def set_of(shards: str | None) -> str | None:
    """The name of the set whose split is at this path, or None."""
    if shards is None or "://" in shards:
        return None
    above = Path(shards).resolve().parent
    return next((name for name in NAMES if folder_of(name).resolve() == above), None)


def folder_of(name: str) -> Path:
    """The folder of a set's splits, below the current folder."""
    return _SETS[name][0]


def how_to_make(name: str) -> str:
    return f"Make them: arvideo demo --set {name}"


def ensure(name: str) -> None:
    """As `ensure_shards`."""
    # It needs PyAV and a pool of processes.
    from arvideo_ds.shards.synthetic import ensure_shards

    ensure_shards(load(name), folder_of(name))


def load(name: str) -> Any:
    """The `SyntheticSet`."""
    _, module, attribute = _SETS[name]
    return getattr(importlib.import_module(module), attribute)
