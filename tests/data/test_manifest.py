"""Opened shards: what is not as the manifest says is refused, with what to do about it."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest

from arvideo_ds.data.manifest import MANIFEST, AlteredError, ShardSet
from arvideo_ds.data.video import probe
from arvideo_ds.errors import UserError


@pytest.fixture
def folder(demo_shards: Path, tmp_path: Path) -> Path:
    """A copy of the demo's shards that a test may damage."""
    return shutil.copytree(demo_shards / "train", tmp_path / "shards")


def first_shard(folder: Path) -> Path:
    return folder / ShardSet(folder).manifest.shards[0].name


def test_every_sample_is_read_by_its_place(folder: Path) -> None:
    shards = ShardSet(folder)
    shards.check_sizes()
    samples = [
        (number, sample)
        for number in range(len(shards.manifest.shards))
        for sample in shards.index(number).samples
    ]
    assert len(samples) == shards.num_samples == 48
    for number, sample in samples[::6]:
        assert probe(io.BytesIO(shards.read(number, sample))).num_frames == sample.num_frames


@pytest.mark.parametrize("missing_bytes", ["one", "whole members"])
def test_a_truncated_shard_is_refused_before_work_and_when_read(
    folder: Path, missing_bytes: str
) -> None:
    sample = ShardSet(folder).index(0).samples[3]
    path = first_shard(folder)
    # A tar cut where a member begins (one block before its data) looks whole to tar readers.
    size = path.stat().st_size - 1 if missing_bytes == "one" else sample.offset - 512
    with path.open("r+b") as file:
        file.truncate(size)
    with pytest.raises(UserError, match=path.name):
        ShardSet(folder).check_sizes()
    shards = ShardSet(folder)
    with pytest.raises(UserError, match=path.name):
        shards.read(0, shards.index(0).samples[0])


def test_a_shard_truncated_while_open_gives_no_half_video(folder: Path) -> None:
    shards = ShardSet(folder)
    first, *_, last = shards.index(0).samples
    shards.read(0, first)
    with first_shard(folder).open("r+b") as file:
        file.truncate(last.offset + last.bytes - 1)
    with pytest.raises(AlteredError):
        shards.read(0, last)


def test_a_missing_shard_is_refused(folder: Path) -> None:
    path = first_shard(folder)
    path.unlink()
    with pytest.raises(UserError, match=path.name):
        ShardSet(folder).check_sizes()


def test_an_altered_or_missing_index_is_refused(folder: Path) -> None:
    path = folder / ShardSet(folder).manifest.shards[0].index_name
    index = json.loads(path.read_bytes())
    index["samples"][0]["label"] += 1
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=path.name):
        ShardSet(folder).index(0)
    path.unlink()
    with pytest.raises(UserError, match=path.name):
        ShardSet(folder).index(0)


def test_a_missing_manifest_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"make_shards\.py .*--output {tmp_path}"):
        ShardSet(tmp_path)


@pytest.mark.parametrize("change", [{"version": 1}, {"unknown": 1}, {"shards": 3}])
def test_a_manifest_of_another_form_is_refused(folder: Path, change: dict[str, object]) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_bytes()) | change))
    with pytest.raises(UserError, match=MANIFEST):
        ShardSet(folder)


def test_the_hash_names_the_data_and_not_the_folder(demo_shards: Path, folder: Path) -> None:
    assert ShardSet(folder).hash == ShardSet(demo_shards / "train").hash
    assert ShardSet(folder).hash != ShardSet(demo_shards / "test").hash
