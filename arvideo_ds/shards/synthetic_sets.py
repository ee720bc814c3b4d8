"""Names and folders of the synthetic sets, without heavy imports."""

from __future__ import annotations

from pathlib import Path
from pkgutil import resolve_name
from typing import Any

_SETS = {
    "demo": "arvideo_ds.shards.demo_set:DEMO",
    "events": "arvideo_ds.shards.events_set:EVENTS",
    "figures": "arvideo_ds.shards.figures_set:FIGURES",
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
    return Path("data", name)


def how_to_make(name: str) -> str:
    return f"Make them: arvideo demo --set {name}"


def ensure(name: str) -> None:
    """As `ensure_shards`."""
    # It needs PyAV and a pool of processes.
    from arvideo_ds.shards.synthetic import ensure_shards

    ensure_shards(load(name), folder_of(name))


def load(name: str) -> Any:
    """The `SyntheticSet`."""
    return resolve_name(_SETS[name])
