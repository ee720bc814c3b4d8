"""Named choices of one kind (objectives, probes, readers, ...) and plugins that add some.

A plugin is a Python file or module that calls `register` while it is imported. The environment
variable ARVIDEO_PLUGINS lists them, separated as in PATH, for ranks, data workers and Slurm jobs
alike. Recipes and run folders cannot name plugins: reading a run never runs its author's code.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Generic, TypeVar

from arvideo_ds.errors import UserError

PLUGINS = "ARVIDEO_PLUGINS"

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Entries by name, in the order of their registration. kind: what an entry is, for errors.
    entries: objects, or "module:attribute" of objects to import at first use."""

    def __init__(self, kind: str, entries: Mapping[str, T | str]) -> None:
        self.kind = kind
        self._entries: dict[str, T | str] = dict(entries)

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that adds an entry. Errors: `UserError` if the name exists."""

        def add(entry: T) -> T:
            if name in self._entries:
                raise UserError(f"the {self.kind} '{name}' already exists; choose another name.")
            self._entries[name] = entry
            return entry

        return add

    def __getitem__(self, name: str) -> T:
        """Errors: KeyError; see `choose`."""
        load_plugins()
        entry = self._entries[name]
        if isinstance(entry, str):
            module, _, attribute = entry.partition(":")
            entry = self._entries[name] = getattr(importlib.import_module(module), attribute)
        return entry

    def __iter__(self) -> Iterator[str]:
        load_plugins()
        return iter(self._entries)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def choose(self, name: str, *, key: str) -> T:
        """The entry of this name. key: its setting or option, for errors. Errors: as `check`."""
        self.check(name, key=key)
        return self[name]

    def check(self, name: str, *, key: str) -> None:
        """Errors: `UserError` that lists the names if this one is unknown. Imports no entry."""
        names = list(self)
        if name in names:
            return
        close = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise UserError(
            f"{key}={name} is not a known {self.kind}; expected one of {', '.join(names)}.{hint}"
            f" A file that registers another one is loaded with {PLUGINS}=FILE."
        )


def listed_plugins() -> list[str]:
    """The entries of ARVIDEO_PLUGINS."""
    return [item for item in os.environ.get(PLUGINS, "").split(os.pathsep) if item]


def load_plugins() -> list[str]:
    """Import the listed plugins, each once per process; returns the list. Errors: `UserError` for a
    plugin that does not exist or fails while it is imported."""
    plugins = listed_plugins()
    for plugin in plugins:
        try:
            if plugin.endswith(".py"):
                _import_file(Path(plugin).absolute())
            else:
                importlib.import_module(plugin)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{PLUGINS}: {plugin} cannot be imported ({type(error).__name__}: {error})."
            ) from error
    return plugins


def _import_file(path: Path) -> None:
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    name = f"arvideo_plugin_{path.stem}_{digest}"
    if name in sys.modules:
        return
    if not path.is_file():
        raise UserError(f"{PLUGINS}: there is no file {path}.")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "the name ends in .py"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses and forked workers look it up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
