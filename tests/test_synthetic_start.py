"""Commands that make the demo's videos: everything else is checked first, and only where used."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arvideo_ds.errors import EXIT_USER_ERROR
from arvideo_ds.shards import synthetic_sets
from arvideo_ds.train import run
from tests.conftest import ROOT

START = {"pretrain": "demo", "train_tokenizer": "tokenizer_demo", "finetune": "finetune_demo"}
Command = Callable[..., int]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the sets that were made, of which nothing is drawn."""
    names: list[str] = []

    def ensure(name: str) -> None:
        names.append(name)

    monkeypatch.setattr(synthetic_sets, "ensure", ensure)
    return names


@pytest.fixture
def start(made: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run a script in an empty folder; a run that would start ends with code 0 instead."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)

    def call(script: str, *arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        return int(runpy.run_path(str(ROOT / "scripts" / f"{script}.py"))["main"]())

    return call


@pytest.fixture
def own_shards(demo_shards: Path, tmp_path: Path) -> str:
    shutil.copytree(demo_shards / "train", tmp_path / "own")
    return "data.shards=own"


@pytest.mark.parametrize("script", START)
@pytest.mark.parametrize(
    "wrong",
    [
        "train.total_batchs=8",
        "train.micro_batch=0",
        "--deepspeed_config=no.json",
        "data.frames=7",
        "data.shards=nowhere",
    ],
)
def test_a_mistake_is_found_before_anything_is_drawn(
    script: str, wrong: str, start: Command, made: list[str]
) -> None:
    assert start(script, "--recipe", START[script], wrong, "data.num_streams=24") == EXIT_USER_ERROR
    assert made == []


def test_a_folder_of_another_run_is_found_before_anything_is_drawn(
    start: Command, made: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "index.jsonl").write_text("{}\n")
    assert start("pretrain") == EXIT_USER_ERROR
    assert start("pretrain", "--resume", "nowhere", "--output", "other") == EXIT_USER_ERROR
    assert made == []


@pytest.mark.parametrize("script", START)
def test_own_shards_need_no_demo(
    script: str,
    start: Command,
    made: list[str],
    own_shards: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[Any] = []
    monkeypatch.setattr(run, "start", lambda *args: started.append(args) or 0)
    shutil.copytree(tmp_path / "own", tmp_path / "test")
    where = [] if script == "pretrain" else ["evaluation.shards=test"]
    assert start(script, "--recipe", START[script], own_shards, *where) == 0
    assert len(started) == 1 and made == []


def test_a_recipe_based_on_the_demo_makes_its_videos_and_one_with_own_shards_does_not(
    start: Command, made: list[str], own_shards: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, demo_shards: Path,
) -> None:  # fmt: skip
    monkeypatch.setattr(run, "start", lambda *args: 0)
    (tmp_path / "mine.yaml").write_text("base: demo\ntrain: {max_steps: 4}\n")
    assert start("pretrain", "--recipe", "mine.yaml", own_shards) == 0
    assert made == []

    def make(name: str) -> None:
        made.append(name)
        shutil.copytree(demo_shards, tmp_path / "data" / "demo")

    monkeypatch.setattr(synthetic_sets, "ensure", make)
    assert start("pretrain", "--recipe", "mine.yaml", "probe.every_epochs=1") == 0
    assert made == ["demo"]


def test_a_dry_run_draws_nothing(
    start: Command, made: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("pretrain", "--dry_run") == 0
    assert json.loads(capsys.readouterr().out)["plan"]["num_videos"] == 2400
    assert made == []


def test_shards_that_need_scores_are_not_drawn_on_the_way(
    start: Command, made: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Scores are made of the shards, so a run cannot follow at once; the message says the way."""
    assert start("pretrain", "--recipe", "lvmae_events") == EXIT_USER_ERROR
    assert made == []
    assert "arvideo demo --set events" in capsys.readouterr().err


def test_the_ablation_of_the_demo_makes_its_videos_and_that_of_own_shards_does_not(
    start: Command, made: list[str], own_shards: str, tmp_path: Path
) -> None:
    assert start("ablate", "motion", "--output", "out", "train.no_such=1") == EXIT_USER_ERROR
    own = ("--train", "own", "--test", "nowhere")
    assert start("ablate", "motion", "--output", "out", *own) == EXIT_USER_ERROR
    assert made == []
    start("ablate", "motion", "--output", "out")
    assert made == ["demo"]


@pytest.mark.parametrize(
    ("shards", "name"),
    [
        ("data/demo/train", "demo"),
        ("./data/events/test", "events"),
        ("data/demo", None),
        ("data/demo/train/deeper", None),
        ("s3://data/demo/train", None),
        (None, None),
    ],
)
def test_a_set_is_known_by_the_folder_of_its_shards(shards: str | None, name: str | None) -> None:
    assert synthetic_sets.set_of(shards) == name
