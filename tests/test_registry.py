"""Registries find built-in entries lazily and those of plugins by ARVIDEO_PLUGINS."""

from __future__ import annotations

from pathlib import Path

import pytest

from arvideo_ds import registry
from arvideo_ds.errors import UserError
from arvideo_ds.registry import PLUGINS, Registry

PLUGIN = """
from tests.test_registry import COLOURS
@COLOURS.register("{name}")
def colour():
    return "{name}"
"""

COLOURS: Registry[object] = Registry("colour", {"red": object(), "path": "pathlib:Path"})


def write_plugin(folder: Path, name: str) -> Path:
    path = folder / f"{name}_plugin.py"
    path.write_text(PLUGIN.format(name=name))
    return path


def test_text_is_imported_at_first_use_and_objects_are_returned() -> None:
    assert COLOURS["path"] is Path
    assert COLOURS["red"] is COLOURS["red"]


def test_plugins_of_two_files_are_loaded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [str(write_plugin(tmp_path, name)) for name in ("green", "blue")]
    monkeypatch.setenv(PLUGINS, ":".join(paths))
    assert {"green", "blue"} < set(COLOURS)
    assert len(COLOURS) == len(list(COLOURS))  # a second look registers nothing twice
    assert registry.load_plugins() == paths


def test_a_wrong_name_gets_the_names_and_the_nearest() -> None:
    with pytest.raises(UserError, match=r"optim.colour=rad is not a known colour.*red.*'red'"):
        COLOURS.choose("rad", key="optim.colour")


def test_a_taken_name_is_refused() -> None:
    with pytest.raises(UserError, match="'red' already exists"):
        COLOURS.register("red")(object())


@pytest.mark.parametrize("text", [None, "import no_such_module_at_all", "1 / 0", "def"])
def test_a_plugin_that_cannot_be_imported_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    path = tmp_path / "broken.py"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv(PLUGINS, str(path))
    for _ in range(2):  # a failed import leaves nothing behind that would pass
        with pytest.raises(UserError, match=r"broken\.py"):
            registry.load_plugins()
