"""Checkpoints on disk: complete or not there, with a stand-in for the engine."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from arvideo_ds.engine import checkpoints
from arvideo_ds.engine.build import Average
from arvideo_ds.engine.checkpoints import (
    Checkpoint,
    export_weights,
    load_checkpoint,
    newest_checkpoint,
    newest_sound_checkpoint,
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


class PlainEngine:
    """Stands in for DeepSpeed's at stage 0: a module and torch's own optimiser."""

    stage = 0
    average: Average | None = None
    frozen: ClassVar[dict[str, Any]] = {}
    config: ClassVar[dict[str, Any]] = {"fp16": {"enabled": False}}

    def __init__(self, seed: int = 0, width: int = 5) -> None:
        torch.manual_seed(seed)
        self.module = nn.Linear(3, width)
        optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.1, fused=True)
        self.deepspeed = SimpleNamespace(
            optimizer=optimizer,
            global_steps=0,
            global_samples=0,
            micro_steps=0,
            skipped_steps=0,
            gradient_accumulation_steps=lambda: 4,
        )

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.module(torch.ones(2, 3)).sum().backward()
            self.deepspeed.optimizer.step()
            self.deepspeed.optimizer.zero_grad()
            self.deepspeed.global_steps += 1

    def weights(self) -> list[float]:
        return torch.cat([p.detach().flatten() for p in self.module.parameters()]).tolist()


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def save(folder: Path, step: int, *, keep: int = 2, engine: Any = None) -> None:
    save_checkpoint(engine or PlainEngine(), folder, step, {"world_size": 1}, keep=keep)


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
    size = (folder / "step-00000300" / "rank-00000.safetensors").stat().st_size
    assert listed == {"rank-00000.safetensors": size}


@pytest.mark.usefixtures("alone")
def test_saving_a_step_again_repairs_a_damaged_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 100)
    save(tmp_path, 200)
    (tmp_path / "step-00000200" / "rank-00000.safetensors").unlink()
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


@pytest.mark.usefixtures("alone")
def test_a_loaded_engine_goes_on_as_the_saved_one(tmp_path: Path) -> None:
    saved, loaded = PlainEngine(), PlainEngine(seed=1)
    saved.train(3)
    save(tmp_path, 3, engine=saved)
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    load_checkpoint(loaded, checkpoint)  # type: ignore[arg-type]
    assert loaded.weights() == saved.weights()
    assert (loaded.deepspeed.global_steps, loaded.deepspeed.micro_steps) == (3, 12)
    for engine in (saved, loaded):
        engine.train(2)
    assert loaded.weights() == saved.weights()


@pytest.mark.usefixtures("alone")
def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    with pytest.raises(UserError, match="of another model: 4 parameters differ, among them bias"):
        load_checkpoint(PlainEngine(width=6), checkpoint)  # type: ignore[arg-type]


@pytest.mark.usefixtures("alone")
def test_a_file_that_lies_about_itself_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    (path,) = checkpoint.path.glob("*.safetensors")
    for content in (b"", b"\xff" * 100, pickle.dumps({"weights": [1]})):
        path.write_bytes(content)
        with pytest.raises(UserError, match="is not part of a checkpoint"):
            load_checkpoint(PlainEngine(), checkpoint)  # type: ignore[arg-type]


def flip_a_bit(path: Path, place: float = 0.5) -> None:
    """One bit of a file, at a share of its length."""
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 0x04
    path.write_bytes(content)


PLACES = [0.0, 0.02, 0.3, 0.5, 0.75, 0.98, 1.0]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("file", ["rank-00000.safetensors", "run.json"])
def test_a_flipped_bit_anywhere_falls_back_to_the_checkpoint_before(
    file: str, place: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 100)
    save(tmp_path, 200)
    flip_a_bit(tmp_path / "step-00000200" / file, place)
    found = newest_sound_checkpoint(tmp_path, own=False)
    assert found is not None
    assert found.step == 100
    assert "step-00000200 is damaged" in capsys.readouterr().out
    with pytest.raises(UserError, match="is damaged"):
        export_weights(tmp_path / "step-00000200", tmp_path / "out.safetensors", prefix="")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.usefixtures("alone")
def test_a_damaged_checkpoint_is_saved_anew_and_pushes_out_no_sound_one(tmp_path: Path) -> None:
    save(tmp_path, 100)
    save(tmp_path, 200)
    flip_a_bit(tmp_path / "step-00000200" / "rank-00000.safetensors", 0.9)
    assert newest_sound_checkpoint(tmp_path, own=True) is not None
    save(tmp_path, 150, keep=1)
    save(tmp_path, 200, keep=1)
    found = newest_sound_checkpoint(tmp_path, own=True)
    assert found is not None
    assert found.step == 200


@pytest.mark.usefixtures("alone")
def test_where_no_checkpoint_is_sound_the_run_does_not_start_anew(tmp_path: Path) -> None:
    assert newest_sound_checkpoint(tmp_path, own=True) is None
    save(tmp_path, 100)
    flip_a_bit(tmp_path / "step-00000100" / "rank-00000.safetensors", 0.9)
    for _ in range(2):  # nor at the second start
        with pytest.raises(UserError, match=r"no checkpoint in .* is sound.*rank-00000"):
            newest_sound_checkpoint(tmp_path, own=True)


@pytest.mark.usefixtures("alone")
def test_a_checkpoint_of_before_the_hashes_still_opens_with_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(tmp_path, 100)
    found = newest_sound_checkpoint(tmp_path, own=True)
    assert found is not None
    assert found.step == 100
    assert "saved without hashes" in capsys.readouterr().out


def test_ranks_hash_a_share_each_and_miss_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"rank-{rank:05d}.safetensors" for rank in range(5)]
    hashed: list[list[str]] = []
    monkeypatch.setattr(
        checkpoints, "changed_files", lambda path, hashes, share: hashed.append(list(share)) or []
    )
    checkpoint = Checkpoint(tmp_path, 1, {"sha256": dict.fromkeys(names, "")})
    for rank in range(3):
        checkpoints._damage(checkpoint, rank=rank, size=3)
    assert sorted(name for share in hashed for name in share) == names
    assert max(map(len, hashed)) == 2


@pytest.mark.usefixtures("alone")
def test_no_room_is_said_before_anything_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    usage = SimpleNamespace(free=10)
    monkeypatch.setattr("arvideo_ds.engine.checkpoints.shutil.disk_usage", lambda path: usage)
    with pytest.raises(
        UserError, match=r"of step 2 could not be written.*0.00 GiB are free.*step 1"
    ):
        save(tmp_path, 2)
    assert newest_step(tmp_path) == 1
    assert not list(tmp_path.glob(".partial-*"))


@pytest.mark.usefixtures("alone")
def test_weights_are_exported_without_an_engine(tmp_path: Path) -> None:
    engine = PlainEngine()
    save(tmp_path, 1, engine=engine)
    export_weights(tmp_path / "step-00000001", tmp_path / "out.safetensors", prefix="we")
    (name, weight) = next(iter(load_file(tmp_path / "out.safetensors").items()))
    assert name == "ight"
    assert torch.equal(weight, engine.module.weight.detach())
    with pytest.raises(UserError, match=r"has no weights named head\.\*"):
        export_weights(tmp_path / "step-00000001", tmp_path / "no.safetensors", prefix="head.")
