"""W&B, TensorBoard and Trackio: they never end a run, and a resumed run continues its curve."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from arvideo_ds.config import PretrainRecipe
from arvideo_ds.config.schema import TrackerSettings, WandbSettings
from arvideo_ds.errors import UserError
from arvideo_ds.train import settle as settling
from arvideo_ds.train.metrics import JsonLines
from arvideo_ds.train.settle import RunOptions, settle
from arvideo_ds.train.trackers import TensorBoard, Trackio, Wandb
from tests.conftest import ROOT


class StubRun:
    """Stub of a W&B run: fails at the second line, when the network goes away."""

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []

    def define_metric(self, *names: str, step_metric: str) -> None: ...

    def log(self, metrics: dict[str, Any]) -> None:
        if self.logged:
            raise ConnectionError("stub: no network")
        self.logged.append(metrics)


def stub_wandb(monkeypatch: pytest.MonkeyPatch, init: Any) -> None:
    """Put a stub in the place of the wandb package."""
    stub = ModuleType("wandb")
    stub.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", stub)


def test_wandb_that_does_not_start_is_said_once_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(**settings: Any) -> None:
        raise RuntimeError("stub: not logged in")

    stub_wandb(monkeypatch, refuse)
    sink = Wandb(tmp_path, WandbSettings(mode="online"), {})
    sink.log({"step": 1})
    sink.log({"step": 2})
    assert capsys.readouterr().out.count("stub: not logged in") == 1


@pytest.mark.parametrize(
    ("recipe", "environment", "passed"),
    [
        ({"mode": "online"}, {}, ("online", "arvideo_ds", None, None, None)),
        ({}, {"MODE": "offline"}, ("offline", "arvideo_ds", None, None, None)),
        ({}, {"MODE": "dryrun"}, ("offline", "arvideo_ds", None, None, None)),
        ({}, {"MODE": "online", "PROJECT": "p", "ENTITY": "e"}, ("online", "p", "e", None, None)),
        (
            {"mode": "offline", "project": "mine", "entity": "me", "group": "g", "tags": ["a"]},
            {"MODE": "online", "PROJECT": "p", "ENTITY": "e"},
            ("offline", "mine", "me", "g", ["a"]),
        ),
    ],
)
def test_the_environment_counts_for_wandb_where_the_recipe_says_nothing(
    recipe: dict[str, Any],
    environment: dict[str, str],
    passed: tuple[Any, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("MODE", "PROJECT", "ENTITY"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    seen: dict[str, Any] = {}
    stub_wandb(monkeypatch, lambda **settings: seen.update(settings) or StubRun())
    settings = WandbSettings.model_validate(recipe).settled()
    Wandb(tmp_path, settings, {})
    assert tuple(seen[k] for k in ("mode", "project", "entity", "group", "tags")) == passed


def test_wandb_is_off_where_neither_the_recipe_nor_the_environment_asks_for_it() -> None:
    assert WandbSettings().settled({}).mode == "disabled"
    assert WandbSettings(mode="disabled").settled({"WANDB_MODE": "online"}).mode == "disabled"


def test_a_mode_of_the_environment_that_wandb_here_does_not_have_is_refused() -> None:
    with pytest.raises(UserError, match=r"WANDB_MODE=onlin.*online, offline or disabled"):
        WandbSettings().settled({"WANDB_MODE": "onlin"})


def test_wandb_that_is_not_installed_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises ImportError
    Wandb(tmp_path, WandbSettings(mode="online"), {}).log({"step": 1})
    assert capsys.readouterr().out.count("W&B is off") == 1


def test_wandb_that_fails_on_the_way_is_left_alone_from_then_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = StubRun()
    stub_wandb(monkeypatch, lambda **settings: run)
    sink = Wandb(tmp_path, WandbSettings(mode="online"), {})
    for step in (1, 2, 3):
        sink.log({"step": step})
    assert run.logged == [{"step": 1}]
    assert capsys.readouterr().out.count("stub: no network") == 1


def test_a_requeued_run_goes_on_with_the_same_wandb_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []

    def start(**settings: Any) -> StubRun:
        seen.append(settings)
        return StubRun()

    stub_wandb(monkeypatch, start)
    for name in ("mine", "mine", "other"):
        (tmp_path / name).mkdir(exist_ok=True)
        Wandb(tmp_path / name, WandbSettings(mode="offline"), {})
    first, again, other = (settings["id"] for settings in seen)
    assert first == again != other
    assert all(settings["resume"] == "allow" for settings in seen)


@pytest.mark.parametrize("key", ["tensorboard=true", "trackio=mine"])
def test_a_missing_package_is_an_error_before_the_run_starts(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settling, "find_spec", lambda package: None)
    package = key.partition("=")[0]
    options = RunOptions("demo", ROOT / "ds_configs/zero2.json", (f"trackers.{key}",), tmp_path)
    with pytest.raises(UserError, match=rf"pip install 'arvideo_ds\[{package}\]'"):
        settle(options, PretrainRecipe, world_size=1)


def test_tensorboard_and_trackio_are_off_by_default() -> None:
    assert not any(TrackerSettings().model_dump().values())


def start(kind: str, folder: Path, first_step: int) -> Any:
    """metrics.jsonl and a tracker, as a run starts them."""
    lines = JsonLines(folder, first_step)
    sink = TensorBoard(folder, first_step) if kind == "tensorboard" else Trackio(folder, "p", {})
    return SimpleNamespace(log=lambda line: (lines.log(line), sink.log(line)), close=sink.close)


def losses_of(kind: str, folder: Path) -> list[tuple[int, float]]:
    """What the tracker's own program shows of the loss: steps and values."""
    if kind == "tensorboard":
        accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        events = accumulator.EventAccumulator(str(folder / "tensorboard"))
        events.Reload()
        return [(event.step, round(event.value, 6)) for event in events.Scalars("loss/pretrain")]
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    (run,) = storage.get_runs("p")
    return [(line["step"], line["loss/pretrain"]) for line in storage.get_logs("p", run)]


@pytest.mark.parametrize("kind", ["tensorboard", "trackio"])
def test_a_crashed_and_resumed_run_has_each_step_once(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(kind)
    folder = tmp_path / "run"
    folder.mkdir()
    if kind == "trackio":
        monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    crashed = start(kind, folder, 0)
    for step in (10, 20, 30):
        crashed.log({"step": step, "loss/pretrain": 1.0, "slowest_host": "a"})
    if kind == "trackio":  # whose queue is of this process
        crashed.close()
    resumed = start(kind, folder, 20)  # from the checkpoint of step 20
    for step in (30, 40):
        resumed.log({"step": step, "loss/pretrain": 0.5, "slowest_host": "a"})
    resumed.close()
    assert losses_of(kind, folder) == [(10, 1.0), (20, 1.0), (30, 0.5), (40, 0.5)]


def test_tensorboard_that_cannot_write_is_reported_once_and_training_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file in the place of the folder")
    sink = TensorBoard(tmp_path, 0)
    for step in (1, 2):
        sink.log({"step": step, "loss/pretrain": 1.0})
    sink.close()
    assert capsys.readouterr().out.count("TensorBoard is off for this run") == 1


def test_trackio_replaces_only_its_own_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of one project may be in folders of the same name."""
    runs: dict[str, list[int]] = {"run": [], "run-12345678": []}

    class Stored(SimpleNamespace):
        def delete(self) -> None:
            del runs[self.name]

    def init(project: str, name: str, **options: Any) -> Any:
        assert name not in runs
        runs[name] = []
        return SimpleNamespace(log=lambda metrics, step: runs[name].append(step))

    stub = ModuleType("trackio")
    stub.Api = lambda: SimpleNamespace(  # type: ignore[attr-defined]
        runs=lambda project: [Stored(name=name) for name in runs]
    )
    stub.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trackio", stub)
    folder = tmp_path / "run"
    folder.mkdir()
    start("trackio", folder, 0).log({"step": 10})
    start("trackio", folder, 10).log({"step": 20})
    own = f"run-{(folder / 'trackio_id').read_text()}"
    assert runs == {"run": [], "run-12345678": [], own: [10, 20]}
