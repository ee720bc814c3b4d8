"""reshard.py: every sample goes where it should, once, with its bytes and its label, or nothing."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import webdataset

from arvideo_ds.errors import UserError
from arvideo_ds.files.locks import LOCK
from arvideo_ds.shards import writer as shard_writer
from arvideo_ds.shards.datasets import Entry, Listing
from arvideo_ds.shards.manifest import MANIFEST, REJECTS, Manifest, Reject, ShardSet
from arvideo_ds.shards.reshard import (
    first_samples,
    merged,
    open_pool,
    split,
    with_keys,
    with_labels,
    write_part,
)
from arvideo_ds.shards.staging import Staged, stage
from arvideo_ds.shards.verify import verify
from arvideo_ds.shards.writer import ShardJob, write_shards
from tests.conftest import ROOT, run_script

# They start processes again and again: not for every `make check`.
pytestmark = pytest.mark.slow

SCRIPT = ROOT / "data_tools" / "reshard.py"


class Video(NamedTuple):
    """What must never change about a sample."""

    sha256: str
    suffix: str
    label_name: str | None
    facts: dict[str, Any]


def videos(*folders: Path) -> dict[str, Video]:
    """Key -> sample, read by plain WebDataset and compared with what ShardSet reads.

    Fails where a key comes twice, or where tar, index and manifest disagree.
    """
    found: dict[str, Video] = {}
    for folder in folders:
        shards = ShardSet(folder)
        shards.check_sizes()
        manifest = shards.manifest
        paths = [str(folder / shard.name) for shard in manifest.shards]
        plain = iter(webdataset.WebDataset(paths, shardshuffle=False, empty_check=False))
        for number in range(len(paths)):
            for sample in shards.index(number).samples:
                member, data = next(plain), shards.read(number, sample)
                facts = json.loads(member["json"])
                assert member["__key__"] == sample.key not in found
                assert member[sample.suffix] == data
                assert facts["label"] == sample.label
                name = None if sample.label is None else (manifest.labels or ())[sample.label]
                assert facts["label_name"] == name
                assert facts["num_frames"] == sample.num_frames
                del facts["label"]
                digest = hashlib.sha256(data).hexdigest()
                found[sample.key] = Video(digest, sample.suffix, name, facts)
        assert next(plain, None) is None
        assert manifest.num_samples == sum(shard.samples for shard in manifest.shards)
    return found


def sound(folder: Path) -> bool:
    done = verify(folder, decode_share=0.01, workers=1, seed=0, timeout_s=60)
    return not done.problems


def files(folder: Path) -> list[Path]:
    """All but the lock, which holds nothing."""
    return [path for path in folder.iterdir() if path.name != LOCK]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in files(folder)}


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    done = run_script(SCRIPT, *arguments)
    assert "Traceback" not in done.stdout + done.stderr
    return done


@dataclass(frozen=True)
class Demo:
    train: Path
    test: Path


@pytest.fixture(scope="module")
def demo(demo_shards: Path) -> Demo:
    return Demo(demo_shards / "train", demo_shards / "test")


def merge(*sources: Path, output: Path, samples_per_shard: int = 10, seed: int = 0) -> Manifest:
    pool = open_pool(sources, seed)
    return write_part(pool, merged(pool, output), how="all", samples_per_shard=samples_per_shard)


def subset(source: Path, output: Path, *labels: str) -> Path:
    pool = open_pool([source], 0)
    write_part(pool, with_labels(pool, labels, output), how="labels", samples_per_shard=10)
    return output


def test_merge_then_split_holds_every_sample_once_with_its_bytes_and_label(
    demo: Demo, tmp_path: Path
) -> None:
    both, out = tmp_path / "both", tmp_path / "out"
    done = command(demo.train, demo.test, "--output", both, "--samples_per_shard", "20")
    assert done.returncode == 0, done.stderr
    assert f"{both}: 96 videos in 5 shards" in done.stdout
    before = videos(demo.train, demo.test)
    assert len(before) == 96
    assert videos(both) == before
    done = command(both, "--output", out, "--split_share", "0.7", "a", "b", "--seed", "3")
    assert done.returncode == 0, done.stderr
    assert videos(out / "a", out / "b") == before
    for folder in (both, out / "a", out / "b"):
        assert sound(folder)
        assert ShardSet(folder).manifest.labels == ShardSet(demo.train).manifest.labels
    assert [ShardSet(out / name).manifest.split for name in "ab"] == ["a", "b"]


def test_the_same_sources_give_the_same_bytes_wherever_they_lie(demo: Demo, tmp_path: Path) -> None:
    copy = shutil.copytree(demo.train, tmp_path / "elsewhere")
    merge(demo.train, demo.test, output=tmp_path / "one")
    merge(copy, demo.test, output=tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    merge(demo.train, demo.test, output=tmp_path / "seed", seed=1)
    assert videos(tmp_path / "seed") == videos(tmp_path / "one")
    assert list(videos(tmp_path / "seed")) != list(videos(tmp_path / "one"))


def test_the_order_of_the_sources_changes_no_tar_where_the_labels_are_the_same(
    demo: Demo, tmp_path: Path
) -> None:
    merge(demo.train, demo.test, output=tmp_path / "one")
    merge(demo.test, demo.train, output=tmp_path / "two")
    tars = [
        [path.read_bytes() for path in sorted((tmp_path / name).glob("*.tar"))]
        for name in ("one", "two")
    ]
    assert tars[0] == tars[1]


def test_facts_pass_byte_for_byte_where_the_label_keeps_its_number(
    demo: Demo, tmp_path: Path
) -> None:
    merge(demo.train, output=tmp_path / "out")
    read = [
        {s["__key__"]: s["json"] for s in webdataset.WebDataset(paths, shardshuffle=False)}
        for paths in (
            [str(path) for path in sorted(folder.glob("*.tar"))]
            for folder in (demo.train, tmp_path / "out")
        )
    ]
    assert read[0] == read[1]


def test_labels_are_united_by_name_and_numbered_anew(demo: Demo, tmp_path: Path) -> None:
    first = subset(demo.train, tmp_path / "first", "west", "north")
    second = subset(demo.test, tmp_path / "second", "south", "east", "north")
    assert ShardSet(first).manifest.labels == ("north", "west")
    assert ShardSet(second).manifest.labels == ("east", "north", "south")
    manifest = merge(first, second, output=tmp_path / "both")
    # The first source's labels keep their numbers.
    assert manifest.labels == ("north", "west", "east", "south")
    assert videos(tmp_path / "both") == videos(first, second)
    assert sound(tmp_path / "both")
    assert manifest.split == "train+test"


def test_samples_without_labels_stay_without(demo: Demo, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    listing = Listing(
        entries=tuple(
            Entry(f"bare/{path.stem}", path, path.name, label_name=None)
            for path in sorted((demo.train.parent / "videos" / "train" / "east").iterdir())
        ),
        labels=None,
    )
    write_shards(
        ShardJob(
            dataset="bare",
            split=None,
            listing=listing,
            output=bare,
            transcode=None,
            samples_per_shard=4,
            seed=0,
            workers=1,
            timeout_s=60.0,
        )
    )
    manifest = merge(bare, demo.train, output=tmp_path / "both")
    assert manifest.labels == ShardSet(demo.train).manifest.labels
    assert manifest.dataset == "bare+folder"
    found = videos(tmp_path / "both")
    assert found == videos(bare, demo.train)
    assert Counter(v.label_name for v in found.values())[None] == 6
    assert sound(tmp_path / "both")


@pytest.mark.parametrize("share", ["0.5", "0.9", "1/3"])
def test_a_split_takes_its_share_of_every_label(demo: Demo, tmp_path: Path, share: str) -> None:
    pool = open_pool([demo.train, demo.test], seed=5)
    first, second = split(pool, Fraction(share), tmp_path, ("a", "b"))
    total = Counter(item.label_name for item in pool.items)
    taken = Counter(item.label_name for item in first.items)
    assert len(first.items) == int(Fraction(share) * 96)
    for label, count in total.items():
        assert abs(taken[label] - Fraction(share) * count) < 1
    keys = [item.key for item in (*first.items, *second.items)]
    assert sorted(keys) == sorted(item.key for item in pool.items)
    other, _ = split(
        open_pool([demo.train, demo.test], seed=6), Fraction(share), tmp_path, ("a", "b")
    )
    assert {item.key for item in other.items} != {item.key for item in first.items}


def test_subsets_hold_what_was_asked_for(demo: Demo, tmp_path: Path) -> None:
    all_videos = videos(demo.train)
    done = command(demo.train, "--output", tmp_path / "two", "--labels", "west", "east")
    assert done.returncode == 0, done.stderr
    assert videos(tmp_path / "two") == {
        key: video for key, video in all_videos.items() if video.label_name in ("east", "west")
    }
    assert ShardSet(tmp_path / "two").manifest.labels == ("east", "west")
    keys = list(all_videos)[5:12]
    (tmp_path / "keys.txt").write_text("\n".join(keys) + "\n\n")
    done = command(demo.train, "--output", tmp_path / "some", "--keys", tmp_path / "keys.txt")
    assert done.returncode == 0, done.stderr
    assert videos(tmp_path / "some") == {key: all_videos[key] for key in keys}
    assert ShardSet(tmp_path / "some").manifest.labels == ShardSet(demo.train).manifest.labels
    done = command(demo.train, "--output", tmp_path / "few", "--max_samples", "9")
    assert done.returncode == 0, done.stderr
    few = videos(tmp_path / "few")
    assert len(few) == 9
    assert few.items() <= all_videos.items()
    for name in ("two", "some", "few"):
        assert sound(tmp_path / name)


def test_more_samples_are_those_of_fewer_and_some(demo: Demo, tmp_path: Path) -> None:
    pool = open_pool([demo.train], seed=2)
    few, more = (first_samples(pool, count, tmp_path).items for count in (7, 20))
    assert more[:7] == few
    assert len(first_samples(pool, 1000, tmp_path).items) == 48


def test_rejects_are_kept_when_nothing_is_chosen(demo: Demo, tmp_path: Path) -> None:
    source = shutil.copytree(demo.train, tmp_path / "source")
    reject = Reject(source_path="a.mp4", reason="empty", message="0 bytes")
    (source / REJECTS).write_text(reject.model_dump_json() + "\n")
    manifest = merge(source, demo.test, output=tmp_path / "out")
    assert manifest.num_rejects == 1
    (line,) = (tmp_path / "out" / REJECTS).read_bytes().splitlines()
    assert Reject.model_validate_json(line) == reject
    assert ShardSet(subset(source, tmp_path / "some", "east")).manifest.num_rejects == 0


def test_a_key_that_two_sources_share_is_named_with_both(demo: Demo, tmp_path: Path) -> None:
    some = subset(demo.train, tmp_path / "some", "east")
    done = command(some, demo.train, "--output", tmp_path / "out")
    assert done.returncode == 2
    assert any(key in done.stderr for key in videos(some))
    assert str(some) in done.stderr
    assert str(demo.train) in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["video", "facts"])
def test_damage_is_never_given_a_new_hash(demo: Demo, tmp_path: Path, place: str) -> None:
    source = shutil.copytree(demo.train, tmp_path / "source")
    shards = ShardSet(source)
    sample, path = shards.index(0).samples[20], source / shards.manifest.shards[0].name
    whole = path.read_bytes()
    if place == "video":
        offset = sample.offset + sample.bytes // 2
        altered = whole[:offset] + bytes([whole[offset] ^ 1]) + whole[offset + 1 :]
    else:
        text = f'"num_frames": {sample.num_frames}'.encode()
        offset = whole.rindex(text, 0, sample.offset)
        altered = whole[: offset + len(text) - 1] + b"9" + whole[offset + len(text) :]
    assert len(altered) == len(whole)
    path.write_bytes(altered)
    with pytest.raises(UserError, match=sample.key) as error:
        merge(source, output=tmp_path / "out")
    assert path.name in str(error.value)
    assert not (tmp_path / "out" / MANIFEST).exists()


def test_a_run_cut_off_goes_on_to_the_same_bytes(demo: Demo, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(demo.train, output=out)
    before = contents(out)
    (out / MANIFEST).unlink()
    first, second, *others = sorted(out.glob("*.index.json"))
    second.unlink()
    (out / "folder-train-000001.tar.partial").write_bytes(b"half")
    kept = {path: path.stat().st_mtime_ns for path in (first, *others)}
    merge(demo.train, output=out)
    assert contents(out) == before
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_other_shards_are_never_overwritten(demo: Demo, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(demo.train, output=out)
    before = contents(out)
    for change in ({"seed": 1}, {"samples_per_shard": 11}):
        with pytest.raises(UserError, match="Choose another --output"):
            merge(demo.train, output=out, **change)
    with pytest.raises(UserError, match="Choose another --output"):
        merge(demo.test, output=out)
    assert contents(out) == before
    pool = open_pool([demo.train], 0)
    keys = [item.key for item in pool.items]
    some = tmp_path / "some"
    write_part(pool, with_keys(pool, keys[:5], some), how="5 keys", samples_per_shard=10)
    with pytest.raises(UserError, match="Choose another --output"):
        write_part(pool, with_keys(pool, keys[5:10], some), how="5 keys", samples_per_shard=10)


def test_too_small_a_disk_is_told_before_anything_is_written(
    demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shard_writer.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match="GiB free"):
        merge(demo.train, output=tmp_path / "out")
    with pytest.raises(UserError, match="GiB free"):
        stage(demo.train, tmp_path / "staged", workers=1)
    assert {path.name for path in tmp_path.glob("*/*")} == {LOCK}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--split_share", "1.5", "a", "b"), "1.5"),
        (("--split_share", "half", "a", "b"), "half"),
        (("--split_share", "0.5", "a", "a"), "'a'"),
        (("--split_share", "0.5", "../a", "b"), "../a"),
        (("--split_share", "0.001", "a", "b"), "'a' without any"),
        (("--labels", "east", "nowhere"), "'nowhere'"),
        (("--max_samples", "0"), "--max_samples"),
        (("--samples_per_shard", "-1"), "--samples_per_shard"),
        (("--keys", "no_such_file"), "no_such_file"),
        (("--stage", "--seed", "1"), "--seed"),
        (("--labels", "east", "--max_samples", "3"), "not allowed with"),
    ],
)
def test_wrong_options_end_with_2_and_write_nothing(
    demo: Demo, tmp_path: Path, options: tuple[str, ...], named: str
) -> None:
    done = command(demo.train, "--output", tmp_path / "out", *options)
    assert done.returncode == 2
    assert named in done.stderr
    assert not list(tmp_path.rglob("*.tar"))


def test_unknown_keys_are_named(demo: Demo, tmp_path: Path) -> None:
    pool = open_pool([demo.train], 0)
    with pytest.raises(UserError, match="'nobody'"):
        with_keys(pool, [pool.items[0].key, "nobody"], tmp_path)


def test_staging_copies_every_file_unchanged_and_only_once(demo: Demo, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "disk" / "out"
    merge(demo.train, output=source)
    done = command(source, "--output", out, "--stage")
    assert done.returncode == 0, done.stderr
    assert contents(out) == contents(source)
    assert ShardSet(out).hash == ShardSet(source).hash
    assert sound(out)
    times = {path: path.stat().st_mtime_ns for path in files(out)}
    assert stage(source, out, workers=2) == Staged(0, 0, len(times))
    assert {path: path.stat().st_mtime_ns for path in files(out)} == times


def test_staging_mends_what_is_missing_half_or_altered_and_nothing_else(
    demo: Demo, tmp_path: Path
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    merge(demo.train, output=source)
    stage(source, out, workers=2)
    missing, half, altered, *_ = sorted(out.glob("*.tar"))
    missing.unlink()
    half.write_bytes(half.read_bytes()[:-512])
    data = bytearray(altered.read_bytes())
    data[700] ^= 1
    altered.write_bytes(data)
    (out / "left.tar.partial").write_bytes(b"half a file")
    wrong = {missing, half, altered, out / MANIFEST, out / "left.tar.partial"}
    times = {path: path.stat().st_mtime_ns for path in files(out) if path not in wrong}
    done = stage(source, out, workers=2)
    assert done.num_copied == 4  # the manifest was taken away until all was right
    assert contents(out) == contents(source)
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_staging_refuses_a_source_that_was_altered(demo: Demo, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    merge(demo.train, output=source)
    path = sorted(source.glob("*.tar"))[1]
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=path.name):
        stage(source, out, workers=2)
    assert not (out / path.name).exists()
    assert not (out / MANIFEST).exists()
    assert not list(out.glob("*.partial"))


def test_staging_leaves_other_shards_alone(demo: Demo, tmp_path: Path) -> None:
    out = shutil.copytree(demo.test, tmp_path / "out")
    before = contents(out)
    with pytest.raises(UserError, match="other shards"):
        stage(demo.train, out, workers=1)
    with pytest.raises(UserError, match="choose another"):
        stage(out, out, workers=1)
    assert contents(out) == before
    assert command(demo.train, demo.test, "--output", out, "--stage").returncode == 2
