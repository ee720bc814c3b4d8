"""data.decoder=auto is one decoder on every rank, whatever the machines have."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from arvideo_ds.config import load_recipe
from arvideo_ds.train import run
from arvideo_ds.train.settle import RunOptions, RunSettings


def settings(*overrides: str) -> RunSettings[Any]:
    recipe, plan = load_recipe("demo", list(overrides)), SimpleNamespace()
    shards = SimpleNamespace(layers=1)
    return RunSettings(RunOptions("demo", Path()), recipe, plan, {}, 0, shards)  # type: ignore[arg-type]


def test_every_rank_decodes_with_what_all_have(monkeypatch: pytest.MonkeyPatch) -> None:
    others = ["torchcodec", "pyav", "decord"], ["pyav"]
    monkeypatch.setattr(run, "gather_objects", lambda own: [own, *others])
    given = settings()
    assert run.with_one_decoder(given).recipe.data.decoder == "pyav"
    assert given.recipe.data.decoder == "auto", "run.json keeps what the recipe says"


def test_a_decoder_that_was_asked_for_stays() -> None:
    assert run.with_one_decoder(settings("data.decoder=decord")).recipe.data.decoder == "decord"
