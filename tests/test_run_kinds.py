"""Every command that takes a run says which kind it takes when it is given another one."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from arvideo_ds.config import Recipe, load_recipe
from arvideo_ds.errors import EXIT_USER_ERROR
from arvideo_ds.runs import run_folder
from tests.conftest import ROOT

RECIPES = {
    "pretrain": ("demo",),
    "finetune": ("finetune_demo",),
    "detect": ("detect_vit_b_ava", "model.size=tiny", "data.size=32", "data.frames=8"),
    "tokenizer": ("tokenizer_demo",),
}
NAMES = {
    "pretrain": "a pretraining run",
    "finetune": "a fine-tuned run",
    "detect": "a detection run",
    "tokenizer": "a run of the tokenizer",
}
ENCODERS = {"pretrain", "finetune", "detect"}
# RUN is the folder of the run, SHARDS one of shards that are there.
TAKES = [
    ("evaluate RUN", {"finetune"}),
    ("predict a.mp4 --model RUN", {"finetune"}),
    ("soup RUN RUN/../other --output OUT", {"finetune"}),
    ("evaluate_detection RUN", {"detect"}),
    ("evaluate_tokenizer RUN", {"tokenizer"}),
    ("probe RUN", {"pretrain"}),
    ("report RUN", {"pretrain"}),
    ("pretrain --output OUT --resume RUN data.shards=nowhere", {"pretrain"}),
    ("pretrain --output OUT --init-from RUN data.shards=nowhere", ENCODERS),
    ("export RUN --format encoder --output OUT", ENCODERS),
    ("extract_features VIDEOS --model RUN --output OUT", ENCODERS),
    ("attention_rank RUN --shards SHARDS --output OUT", ENCODERS),
    ("attention_rank untrained:RUN --shards SHARDS --output OUT", {"pretrain"}),
    ("finetune --recipe finetune_demo --output OUT --init-from RUN data.shards=nowhere", ENCODERS),
    ("detect --recipe detect_vit_b_ava --output OUT --init-from RUN", ENCODERS),
    ("score_tokens --shards SHARDS --scorer tokenizer --tokenizer RUN", {"tokenizer"}),
]


@pytest.fixture
def said(
    tmp_path: Path,
    demo_shards: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[[str, str], str]:
    """What a command prints as its error when it is given an unfinished run of a task."""
    monkeypatch.chdir(tmp_path)

    def call(line: str, task: str) -> str:
        name, *overrides = RECIPES[task]
        for folder in (tmp_path / "run", tmp_path / "other"):
            folder.mkdir()
            run_folder.write_recipe(folder, load_recipe(name, overrides, Recipe))
        line = line.replace("RUN", "run").replace("SHARDS", str(demo_shards / "test"))
        script, *arguments = line.split()
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        assert runpy.run_path(str(ROOT / "scripts" / f"{script}.py"))["main"]() == EXIT_USER_ERROR
        return capsys.readouterr().err

    return call


@pytest.mark.parametrize("task", RECIPES)
@pytest.mark.parametrize(("line", "takes"), TAKES, ids=[line for line, _ in TAKES])
def test_a_run_of_the_wrong_kind_is_refused_with_the_kinds_that_are_taken(
    line: str, takes: set[str], task: str, said: Callable[[str, str], str]
) -> None:
    if "untrained:" in line and task in takes:
        return  # such a run need not be finished: it would be measured
    error = said(line, task)
    if task in takes:
        assert "expected" not in error
    else:
        listed = " or ".join(NAMES[name] for name in RECIPES if name in takes)
        assert f"expected {listed}, but run is {NAMES[task]}" in error
