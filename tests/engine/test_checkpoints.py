"""Checkpoints on disk: complete or not there; folders made by hand, no engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from arvideo_ds.engine.checkpoints import (
    Checkpoint,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from arvideo_ds.errors import UserError

SHARDS = {"mp_rank_00_model_states.pt": b"weights", "deep/optim_states.pt": b"moments" * 9}


def fake(folder: Path, step: int, *, name: str | None = None) -> Path:
    """A complete checkpoint without an engine."""
    path = folder / (name or f"step-{step:08d}")
    for file, content in SHARDS.items():
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        (path / file).write_bytes(content)
    sizes = {file: len(content) for file, content in SHARDS.items()}
    (path / "run.json").write_text(json.dumps({"step": step, "world_size": 1, "files": sizes}))
    return path


def newest_step(folder: Path) -> int | None:
    found = newest_checkpoint(folder)
    return None if found is None else found.step


def test_the_newest_complete_checkpoint_is_chosen_with_its_facts(tmp_path: Path) -> None:
    for step in (500, 10_000, 1500):
        fake(tmp_path, step)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 10_000
    assert found.path == tmp_path / "step-00010000"
    assert found.facts["world_size"] == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "deep/optim_states.pt").unlink(),
        lambda path: (path / "deep/optim_states.pt").write_bytes(b"short"),
        lambda path: (path / "mp_rank_00_model_states.pt").write_bytes(b"weights and more"),
        lambda path: (path / "run.json").unlink(),
        lambda path: (path / "run.json").write_text('{"step": 10'),
        lambda path: (path / "run.json").write_text("{}"),
        lambda path: (path / "run.json").write_text(""),
    ],
    ids=["missing", "short", "long", "no marker", "torn marker", "empty marker", "no bytes"],
)
def test_a_damaged_checkpoint_is_passed_over(damage: Any, tmp_path: Path) -> None:
    fake(tmp_path, 500)
    damage(fake(tmp_path, 1000))
    assert newest_step(tmp_path) == 500
    damage(tmp_path / "step-00000500")
    assert newest_step(tmp_path) is None


def test_a_save_that_was_cut_off_is_no_checkpoint(tmp_path: Path) -> None:
    fake(tmp_path, 1000, name=".partial-step-00001000")
    assert newest_step(tmp_path) is None
    fake(tmp_path, 500)
    assert newest_step(tmp_path) == 500


def test_no_folder_holds_no_checkpoint(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "none") is None


class FakeEngine:
    """Stands in for DeepSpeed's engine: writes the files above, and remembers what it loads."""

    def __init__(self, stage: int = 2) -> None:
        self.stage = stage
        self.deepspeed = SimpleNamespace(
            save_checkpoint=self._save, load_checkpoint=lambda folder, tag: (folder, {})
        )

    def _save(self, folder: str, *, tag: str, save_latest: bool) -> None:
        assert not save_latest
        for file, content in SHARDS.items():
            (Path(folder) / tag / file).parent.mkdir(parents=True, exist_ok=True)
            (Path(folder) / tag / file).write_bytes(content)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def save(folder: Path, step: int, *, keep: int = 2) -> None:
    save_checkpoint(FakeEngine(), folder, step, {"world_size": 1}, keep=keep)  # type: ignore[arg-type]


@pytest.mark.usefixtures("alone")
def test_what_was_saved_is_complete_named_as_latest_and_the_newest_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    fake(folder, 150, name=".partial-step-00000150")
    for step in (100, 200, 300):
        save(folder, step)
        assert newest_step(folder) == step
        assert (folder / "latest").read_text() == f"step-{step:08d}"
    kept = {path.name for path in folder.iterdir()}
    assert kept == {"step-00000200", "step-00000300", "latest"}
    listed = json.loads((folder / "step-00000300" / "run.json").read_text())["files"]
    assert listed == {file: len(content) for file, content in SHARDS.items()}


@pytest.mark.usefixtures("alone")
def test_saving_a_step_again_repairs_a_damaged_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 100)
    save(tmp_path, 200)
    (tmp_path / "step-00000200" / "deep/optim_states.pt").unlink()
    assert newest_step(tmp_path) == 100
    save(tmp_path, 200)
    assert newest_step(tmp_path) == 200


@pytest.mark.usefixtures("alone")
def test_a_damaged_checkpoint_does_not_push_out_a_complete_one(tmp_path: Path) -> None:
    save(tmp_path, 100)
    save(tmp_path, 300)
    (tmp_path / "step-00000300" / "run.json").unlink()
    save(tmp_path, 200, keep=1)
    assert newest_step(tmp_path) == 200


@pytest.mark.parametrize(
    ("saved", "now", "loads"),
    [
        ((8, 2), (8, 2), True),
        ((8, 2), (4, 2), False),
        ((8, 2), (8, 3), False),
        # Nothing is partitioned at stage 0.
        ((8, 0), (4, 0), True),
        ((8, 0), (8, 1), False),
    ],
)
def test_only_the_ranks_and_stage_that_saved_may_load(
    saved: tuple[int, int], now: tuple[int, int], loads: bool, tmp_path: Path
) -> None:
    facts = {"world_size": saved[0], "zero_stage": saved[1]}
    checkpoint, engine = Checkpoint(tmp_path / "step-00000100", 100, facts), FakeEngine(now[1])
    if loads:
        load_checkpoint(engine, checkpoint, world_size=now[0])  # type: ignore[arg-type]
        return
    with pytest.raises(UserError) as raised:
        load_checkpoint(engine, checkpoint, world_size=now[0])  # type: ignore[arg-type]
    message = str(raised.value)
    assert f"{saved[0]} rank(s) with ZeRO stage {saved[1]}" in message
    assert f"{now[0]} with stage {now[1]}" in message


def test_a_checkpoint_that_deepspeed_does_not_load_is_an_error(tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.deepspeed.load_checkpoint = lambda folder, tag: (None, None)
    checkpoint = Checkpoint(tmp_path / "step-00000100", 100, {"world_size": 1, "zero_stage": 2})
    with pytest.raises(UserError, match="step-00000100"):
        load_checkpoint(engine, checkpoint, world_size=1)  # type: ignore[arg-type]
