"""Opened shards: what is not as the manifest says is refused, with what to do about it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from pathlib import Path

import pytest

from arvideo_ds.decoding.video import probe
from arvideo_ds.errors import UserError
from arvideo_ds.shards.manifest import (
    MANIFEST,
    AlteredError,
    Manifest,
    Shard,
    ShardSet,
    dump_json,
)


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
    with pytest.raises(UserError, match=rf"arvideo shards .*--output {tmp_path}"):
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


@pytest.mark.parametrize("fault", ["missing", "damaged", "swapped"])
def test_a_start_finds_indices_that_are_not_those_of_the_manifest(
    textured_shards: Path, tmp_path: Path, fault: str
) -> None:
    folder = shutil.copytree(textured_shards, tmp_path / "shards")
    shards = ShardSet(folder)
    second, third = (folder / shards.manifest.shards[n].index_name for n in (1, 2))
    if fault == "missing":
        second.unlink()
    elif fault == "damaged":
        second.write_bytes(second.read_bytes()[:-5])
    else:
        spare = second.rename(folder / "spare")
        third.rename(second)
        spare.rename(third)
    with pytest.raises(UserError, match=f"{second.name}|{third.name}"):
        shards.check(limit_s=60)


def test_a_check_begins_nothing_after_its_time(textured_shards: Path) -> None:
    assert ShardSet(textured_shards).check(limit_s=60) == 3
    assert ShardSet(textured_shards).check(limit_s=-1) == 0


def test_a_video_larger_than_one_read_is_read_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux returns at most 2 GiB of a file at once; here 100 bytes."""
    shards, pread = ShardSet(folder), os.pread
    sample = shards.index(0).samples[0]
    expected = shards.read(0, sample)
    monkeypatch.setattr(os, "pread", lambda file, size, at: pread(file, min(size, 100), at))
    assert shards.read(0, sample) == expected
    last = shards.manifest.shards[0].bytes - 150
    assert len(shards.read_bytes(0, last, 10**4)) == 150


def test_shards_have_the_same_columns_in_every_layout_of_the_json(folder: Path) -> None:
    tree = json.loads((folder / MANIFEST).read_bytes())
    hashes = [f"{n:064x}" for n in range(3)]
    tree["shards"] = [
        {"name": name, "samples": n, "bytes": 2**40 + n, "sha256": own, "index_sha256": own}
        for n, (name, own) in enumerate(zip(["é.tar", "a}.tar", "b.tar"], hashes, strict=True))
    ]
    tree["num_samples"] = 3
    for indent, moved in ((1, False), (None, False), (3, False), (1, True)):
        # Keys after the shards, and what looks like their end in a name of a class.
        own = {"labels": ['\n "shards": [', "  },"], **tree}
        own |= {"labels": own.pop("labels")} if moved else {}
        (folder / MANIFEST).write_text(json.dumps(own, indent=indent), encoding="utf-8")
        shards = ShardSet(folder).manifest.shards
        assert [shard.model_dump() for shard in shards] == tree["shards"]
        assert [shard.name for shard in shards[1:]] == ["a}.tar", "b.tar"]
        assert shards[-1] == shards[2]
        with pytest.raises(IndexError):
            shards[3]


def test_a_manifest_is_written_as_version_2_always_was() -> None:
    """Hashes of manifests name data sets in checkpoints."""
    shard = Shard(name="a-000000.tar", samples=2, bytes=10, sha256="0" * 64, index_sha256="1" * 64)
    manifest = Manifest(
        dataset="a",
        split=None,
        labels=("x", "é"),
        settings={"video": "copy", "gop": None},
        num_samples=2,
        num_rejects=1,
        shards=(shard,),
    )
    golden = "d7e1f591dffa3d5c200ed24ad3245a3d98d215f965a7f0801a06838c2e693114"
    assert hashlib.sha256(dump_json(manifest)).hexdigest() == golden
