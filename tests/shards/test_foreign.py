"""Tars that we did not write: indexed in place, then read like our own."""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arvideo_ds.decoding.decoders import decode
from arvideo_ds.errors import UserError
from arvideo_ds.shards.foreign import index_shards, samples_of
from arvideo_ds.shards.manifest import ShardSet
from tests.conftest import ROOT, run_script

SCRIPT = ROOT / "data_tools" / "index_shards.py"


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


@pytest.fixture
def videos(demo_shards: Path) -> list[bytes]:
    files = sorted((demo_shards / "videos" / "train").rglob("*.mp4"))[:4]
    return [path.read_bytes() for path in files]


def test_videos_are_found_with_keys_and_labels_wherever_they_lie(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a.tar",
        {
            "deep/one.mp4": b"1",
            "deep/one.cls": b"3",
            "two.json": as_json({"label": 5, "caption": "x"}),
            "two.seg.mp4": b"other",
            "two.webm": b"22",
            "three.mov": b"333",
            "four.txt": b"no video",
        },
    )
    found = [(s.key, s.suffix, s.label, s.member.bytes) for s in samples_of(tmp_path / "a.tar")]
    assert found == [
        ("deep/one", "mp4", 3, 1),
        ("two", "webm", 5, 2),
        ("three", "mov", None, 3),
    ]


@pytest.mark.parametrize("content", [b"", b"-1", b"true", b"1.5", b"[1]", b"\xff"])
def test_a_label_that_is_no_number_and_no_name_is_said(content: bytes, tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"x.mp4": b"1", "x.cls": content})
    with pytest.raises(UserError, match=r"a\.tar, x: its label cannot be read"):
        samples_of(tmp_path / "a.tar")


def indexed(folder: Path, labels: Path | None = None) -> tuple[dict[str, int | None], ShardSet]:
    """Key -> label of all samples, after indexing."""
    index_shards(folder, dataset="x", workers=1, timeout_s=60, labels=labels)
    shards = ShardSet(folder)
    samples = (s for n in range(len(shards.manifest.shards)) for s in shards.index(n).samples)
    return {sample.key: sample.label for sample in samples}, shards


@pytest.mark.slow
def test_names_are_numbered_over_all_tars_or_as_told(tmp_path: Path, videos: list[bytes]) -> None:
    tars, names = tmp_path / "tars", tmp_path / "classes.txt"
    tars.mkdir()
    write_tar(tars / "0.tar", {"a.mp4": videos[0], "a.cls": b"run\n", "b.mp4": videos[1]})
    write_tar(tars / "1.tar", {"c.mp4": videos[2], "c.json": as_json({"label": "jump"})})
    labels, shards = indexed(tars)
    assert (labels, shards.manifest.labels) == ({"a": 1, "b": None, "c": 0}, ("jump", "run"))
    names.write_text("run\nwalk\njump\n")
    written = (tars / "0.tar").stat().st_mtime_ns
    labels, shards = indexed(tars, names)
    assert (labels, shards.manifest.labels) == (
        {"a": 0, "b": None, "c": 2},
        ("run", "walk", "jump"),
    )
    assert (tars / "0.tar").stat().st_mtime_ns == written
    names.write_text("run\n")
    with pytest.raises(UserError, match=r"classes\.txt lacks the label 'jump'"):
        indexed(tars, names)
    write_tar(tars / "2.tar", {"d.mp4": videos[3], "d.cls": b"7"})
    with pytest.raises(UserError, match=r"names \('jump'\), others numbers \(7\)"):
        indexed(tars)


@pytest.mark.slow
def test_a_tar_that_was_replaced_is_said_with_the_file_to_remove(
    tmp_path: Path, videos: list[bytes]
) -> None:
    write_tar(tmp_path / "0.tar", {"a.mp4": videos[0]})
    indexed(tmp_path)
    write_tar(tmp_path / "0.tar", {"a.mp4": videos[1], "b.mp4": videos[2] * 9})
    with pytest.raises(UserError, match=r"0\.index\.json .*Remove that index \(not the tar\)"):
        indexed(tmp_path)
    (tmp_path / "0.index.json").unlink()
    assert set(indexed(tmp_path)[0]) <= {"a", "b"}


@pytest.mark.slow
def test_an_indexed_folder_is_read_like_our_own(tmp_path: Path, videos: list[bytes]) -> None:
    write_tar(tmp_path / "x-0.tar", {"a.mp4": videos[0], "a.cls": b"1", "b.mp4": videos[1]})
    write_tar(tmp_path / "x-1.tar", {"c.mp4": videos[2], "d.mp4": videos[3][:500], "e.mp4": b""})
    before = [path.read_bytes() for path in sorted(tmp_path.glob("*.tar"))]
    for _ in range(2):  # the second time nothing is left to do
        done = run_script(SCRIPT, tmp_path)
        assert done.returncode == 3, done.stderr
        assert "3 videos in 2 tars" in done.stdout
        assert re.search(r"rejected: 2 \(.*1 empty.*\); see .*rejects\.jsonl", done.stdout)
    done = run_script(SCRIPT, tmp_path, "--max_reject_share", "0.5")
    assert done.returncode == 0, done.stderr
    assert [path.read_bytes() for path in sorted(tmp_path.glob("*.tar"))] == before
    shards = ShardSet(tmp_path)
    shards.check_sizes()
    samples = [(0, s) for s in shards.index(0).samples] + [(1, s) for s in shards.index(1).samples]
    assert [(s.key, s.label) for _, s in samples] == [("a", 1), ("b", None), ("c", None)]
    for (shard, sample), video in zip(samples, videos, strict=False):
        assert shards.read(shard, sample) == video
        last = decode("decord", shards.read(shard, sample), np.array([sample.num_frames - 1]))
        assert last.shape[0] == 1
    for tool in ("verify_shards.py", "inspect_shards.py"):
        done = run_script(ROOT / "data_tools" / tool, tmp_path)
        assert (done.returncode, "needs shards of `arvideo shards`" in done.stderr) == (2, True)
    assert "--video transcode" not in (tmp_path / "rejects.jsonl").read_text()
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "rejects.jsonl").open()]
    assert "empty" in reasons


@pytest.mark.slow
def test_our_own_shards_are_left_alone(demo_shards: Path) -> None:
    done = run_script(SCRIPT, demo_shards / "train")
    assert done.returncode == 2
    assert "need no other index" in done.stderr


@pytest.mark.slow
def test_what_is_no_folder_of_tars_is_said(tmp_path: Path) -> None:
    done = run_script(SCRIPT, tmp_path)
    assert done.returncode == 2
    assert "is not a folder with .tar files" in done.stderr
    (tmp_path / "a.tar").write_bytes(b"no tar at all" * 100)
    done = run_script(SCRIPT, tmp_path)
    assert done.returncode == 2
    assert "is not a complete tar" in done.stderr
    assert "Traceback" not in done.stderr
