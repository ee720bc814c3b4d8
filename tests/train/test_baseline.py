"""The loss of predicting the mean: measured once; a run that does not beat it says so."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from arvideo_ds.config import PretrainRecipe
from arvideo_ds.planning.plan import make_plan
from arvideo_ds.runs import run_folder
from arvideo_ds.train import baseline, record
from arvideo_ds.train.baseline import Baseline
from arvideo_ds.train.loop import Outcome
from arvideo_ds.train.settle import RunOptions, RunSettings

CPU = torch.device("cpu")


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks, of which the other one measured 3.0 over 4 clips."""

    def gather(own: list[float], device: torch.device) -> list[list[float]]:
        return [own, [3.0, 4.0]]

    monkeypatch.setattr(baseline, "gather_over_ranks", gather)


def test_it_is_measured_on_the_first_batch_and_averaged_over_the_clips_of_all_ranks(
    ranks: None,
) -> None:
    seen, kept = [], []

    def measure(batch: Any) -> torch.Tensor:
        seen.append(batch)
        return torch.tensor([5.0, 6.0])

    subject = Baseline(None, measure, kept.append)
    for batch in ("first", "second"):
        subject.see(batch)  # type: ignore[arg-type]
    assert kept == []  # nothing is read before a log step
    subject.read(CPU)
    subject.see("third")  # type: ignore[arg-type]
    subject.read(CPU)
    assert seen == ["first"] and kept == [0.8]


def test_a_batch_without_a_clip_that_decoded_is_followed_by_another_try(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(baseline, "gather_over_ranks", lambda own, device: [own])
    sums, kept = iter([[0.0, 0.0], [1.5, 2.0]]), []
    subject = Baseline(None, lambda batch: torch.tensor(next(sums)), kept.append)
    for _ in range(3):
        subject.see(None)  # type: ignore[arg-type]
        subject.read(CPU)
    assert kept == [0.75]


@pytest.mark.parametrize(("known", "measure"), [(0.9, lambda batch: 1 / 0), (None, None)])
def test_what_is_known_and_what_has_no_such_loss_is_not_measured(known: Any, measure: Any) -> None:
    """No collective either: a resumed run and other tasks have no process to talk to here."""
    subject = Baseline(known, measure, lambda loss: pytest.fail("kept"))
    subject.see(None)  # type: ignore[arg-type]
    subject.read(CPU)


@pytest.mark.parametrize(
    ("loss", "below"), [(0.97, False), (0.9688, False), (float("nan"), False), (0.5, True)]
)
def test_a_run_that_has_learnt_nothing_says_so(
    loss: float, below: bool, tiny: Any, tmp_path: Path
) -> None:
    recipe: PretrainRecipe = tiny()
    shards: Any = SimpleNamespace(hash="abc")
    options, plan = RunOptions("demo", Path(), output=tmp_path), make_plan(recipe, world_size=1)
    outcome = Outcome(4, {"step": 4, "loss/pretrain": loss}, interrupted=False)
    settings: Any = RunSettings(options, recipe, plan, {}, 0, shards)
    words = record.summarize(settings, outcome, 0, 1.0, 0.9688)
    summary = run_folder.read_summary(tmp_path)
    assert (summary["baseline_loss"], summary["below_baseline"]) == (0.9688, below)
    assert ("has not fallen below that of predicting the mean" in words) is not below
