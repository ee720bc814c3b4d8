"""Files are there whole or not at all."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from arvideo_ds.files.atomic import replacing, write_json, write_text


def test_an_error_leaves_the_file_before_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    write_text(path, "before")
    with pytest.raises(RuntimeError), replacing(path) as partial:
        partial.write_text("half of wh")
        raise RuntimeError
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_the_new_content_replaces_the_old_one_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    write_text(path, "before")
    with replacing(path) as partial:
        partial.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert list(tmp_path.iterdir()) == [path]


def test_json_has_null_for_numbers_that_are_not_finite(tmp_path: Path) -> None:
    facts = {"a": [math.nan, {"b": -math.inf}], "c": (1.5, "x")}
    write_json(tmp_path / "facts.json", facts)
    text = (tmp_path / "facts.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": [None, {"b": None}],
        "c": [1.5, "x"],
    }
