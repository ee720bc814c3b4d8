"""scripts/report.py: all that a run wrote is in its page, with the runs that it continues."""

from __future__ import annotations

import base64
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arvideo_ds.config import PretrainRecipe
from arvideo_ds.evaluation import pictures
from arvideo_ds.evaluation.probes import POOLINGS, description
from arvideo_ds.evaluation.report import Section
from arvideo_ds.planning.plan import make_plan
from arvideo_ds.runs import run_folder
from arvideo_ds.train import report as train_report

SCRIPT = Path(__file__).parent.parent / "scripts" / "report.py"
FINAL = {"loss/pretrain": 1.01}
Report = Callable[..., str]


@pytest.fixture
def make_run(tiny: Callable[..., PretrainRecipe], tmp_path: Path) -> Callable[..., Path]:
    """A run's folder as training leaves it, without weights; metrics at each given step."""

    def make(name: str, steps: range, parent: dict[str, Any] | None = None, **summary: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        recipe = tiny()
        run_folder.write_recipe(folder, recipe)
        lines = [{"step": s, "loss/pretrain": 100.0 * len(name) + s, "lr": 1e-3} for s in steps]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / run_folder.METRICS).write_text(text)
        (folder / run_folder.FACTS).write_text(json.dumps({"parent": parent}))
        facts = {
            "plan": make_plan(recipe, world_size=1).as_dict(),
            "steps": steps.stop - 1,
            "train_seconds_of_last_start": 60.0,
            "commit": "c0ffee",
        }
        run_folder.update_summary(folder, {**facts, **summary})
        return folder

    return make


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the pictures were made of; predictions need weights and have tests of their own."""
    seen: dict[str, Any] = {"probes": []}
    draw_loss, draw_probes = pictures.draw_loss, pictures.draw_probes

    def loss(metrics: Any, *args: Any, **named: Any) -> Any:
        seen["loss"] = metrics
        seen["figure"] = draw_loss(metrics, *args, **named)
        return seen["figure"]

    def probes(found: Any) -> Any:
        figure = draw_probes(found)
        seen["probes"].append([label.get_text() for label in figure.axes[0].get_xticklabels()])
        return figure

    monkeypatch.setattr(pictures, "draw_loss", loss)
    monkeypatch.setattr(pictures, "draw_probes", probes)
    return seen


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch, drawn: dict[str, Any]) -> Report:
    def make(folder: Path, *options: str) -> str:
        main = runpy.run_path(str(SCRIPT))["main"]
        nothing = Section("Predictions", "not drawn")
        monkeypatch.setattr(train_report, "predictions", lambda *args: nothing)
        monkeypatch.setattr(sys, "argv", ["report.py", str(folder), *options])
        assert main() == 0
        return (folder / "report.html").read_text()

    return make


def probed(features: str = "mean", **more: float) -> dict[str, Any]:
    names = ("linear_probe_accuracy", "knn_accuracy")
    found = {prefix + name: 0.5 for prefix in ("", "untrained_") for name in names}
    return {**found, "probe_chance_accuracy": 0.125, "probe_features": features, **more}


@pytest.mark.parametrize("features", list(POOLINGS))
def test_every_kind_of_probe_features_is_described(
    features: str, make_run: Callable[..., Path], report: Report
) -> None:
    page = report(make_run("run", range(1, 4), **probed(features)))
    assert f"Frozen encoder, {description(POOLINGS[features])} of the central clip" in page


def test_pictures_are_files_too_on_request(
    tmp_path: Path, make_run: Callable[..., Path], report: Report
) -> None:
    run, folder = (
        make_run("run", range(1, 4), **probed(), probes={"hm/db": probed()}),
        tmp_path / "p",
    )
    page = report(run, "--pictures", str(folder))
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(files) == ["loss_1.png", "probes_1.png", "probes_hm_db_1.png"]
    for picture in files.values():
        assert base64.b64encode(picture).decode() in page


def test_other_probes_are_drawn_where_they_were_made(
    make_run: Callable[..., Path], report: Report, drawn: dict[str, Any]
) -> None:
    report(make_run("plain", range(1, 4), **probed()))
    attentive = {"attentive_probe_accuracy": 0.7, "untrained_attentive_probe_accuracy": 0.2}
    report(make_run("attentive", range(1, 4), **probed(**attentive)))
    plugin = {"nearest_mean_accuracy": 0.6, "untrained_nearest_mean_accuracy": 0.2}
    report(make_run("plugin", range(1, 4), **probed(**plugin)))
    two = ["linear probe", "nearest neighbours"]
    # Without the plugin that a probe came from, it is drawn with its name.
    assert drawn["probes"] == [two, [*two, "attentive probe"], [*two, "nearest_mean"]]


def test_probes_on_other_sets_are_drawn_with_their_names(
    make_run: Callable[..., Path], report: Report, drawn: dict[str, Any]
) -> None:
    sets = {"hmdb": probed(), "ucf": probed("change")}
    page = report(make_run("run", range(1, 4), probes=sets))
    assert len(drawn["probes"]) == 2
    assert "hmdb" in page and "ucf" in page


def test_the_curve_begins_with_the_runs_that_were_continued(
    make_run: Callable[..., Path], report: Report, drawn: dict[str, Any]
) -> None:
    """Of each parent up to the step that its child went on from, however far it went later."""
    make_run("first", range(1, 9))
    make_run("second", range(5, 12), parent={"run": "../first", "step": 4})
    page = report(make_run("third", range(7, 10), parent={"run": "../second", "step": 6}))
    assert [m["step"] for m in drawn["loss"]] == list(range(1, 10))
    assert [m["loss/pretrain"] // 100 for m in drawn["loss"]] == [5] * 4 + [6] * 2 + [5] * 3
    assert "second from step 6, which continues first from step 4" in page


def test_a_parent_that_is_missing_is_reported(
    make_run: Callable[..., Path], report: Report, drawn: dict[str, Any]
) -> None:
    page = report(make_run("child", range(5, 8), parent={"run": "../gone", "step": 4}))
    assert [m["step"] for m in drawn["loss"]] == [5, 6, 7]
    assert "gone from step 4" in page and "Steps 1 to 4 are not drawn" in page


def test_a_run_that_continues_itself_ends(
    make_run: Callable[..., Path], report: Report, drawn: dict[str, Any]
) -> None:
    """run.json is a file; nothing in it may make the report go round for ever."""
    report(make_run("loop", range(5, 8), parent={"run": "../loop", "step": 6}))
    assert [m["step"] for m in drawn["loss"]][-3:] == [5, 6, 7]


def test_the_loss_of_predicting_the_mean_is_a_line(
    make_run: Callable[..., Path], report: Report, drawn: dict[str, Any]
) -> None:
    page = report(
        make_run("run", range(1, 4), baseline_loss=0.96875, below_baseline=False, final=FINAL)
    )
    levels = [line.get_ydata() for line in drawn["figure"].axes[0].get_lines()]
    assert any(list(level) == [0.96875] * 2 for level in levels)
    assert "has not fallen below that of predicting the mean" in page


def test_a_run_without_a_summary_is_refused_in_words(
    make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    folder = make_run("run", range(1, 4))
    (folder / run_folder.SUMMARY).unlink()
    monkeypatch.setattr(sys, "argv", ["report.py", str(folder)])
    assert runpy.run_path(str(SCRIPT))["main"]() == 2
    assert "summary.json" in capsys.readouterr().err
