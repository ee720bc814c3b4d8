"""Tars that we did not write: indexed in place, then read like our own."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arvideo_ds.data.decoders import decode
from arvideo_ds.data.foreign import samples_of
from arvideo_ds.data.manifest import ShardSet
from arvideo_ds.errors import UserError
from tests.conftest import ROOT, run_command

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


@pytest.mark.parametrize("content", [b"cat", b"-1", b"true", b"1.5"])
def test_a_label_that_is_no_class_number_is_named(content: bytes, tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"x.mp4": b"1", "x.cls": content})
    with pytest.raises(UserError, match=r"a\.tar, x: its label cannot be read"):
        samples_of(tmp_path / "a.tar")


@pytest.mark.slow
def test_an_indexed_folder_is_read_like_our_own(tmp_path: Path, videos: list[bytes]) -> None:
    write_tar(tmp_path / "x-0.tar", {"a.mp4": videos[0], "a.cls": b"1", "b.mp4": videos[1]})
    write_tar(tmp_path / "x-1.tar", {"c.mp4": videos[2], "d.mp4": videos[3][:500], "e.mp4": b""})
    before = [path.read_bytes() for path in sorted(tmp_path.glob("*.tar"))]
    for _ in range(2):  # the second time nothing is left to do
        done = run_command(sys.executable, SCRIPT, tmp_path)
        assert done.returncode == 0, done.stderr
        assert "3 videos in 2 tars, 2 left out" in done.stdout
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
        done = run_command(sys.executable, ROOT / "data_tools" / tool, tmp_path)
        assert (done.returncode, "needs shards of make_shards.py" in done.stderr) == (2, True)
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "rejects.jsonl").open()]
    assert "empty" in reasons


def test_our_own_shards_are_left_alone(demo_shards: Path) -> None:
    done = run_command(sys.executable, SCRIPT, demo_shards / "train")
    assert done.returncode == 2
    assert "need no other index" in done.stderr


def test_what_is_no_folder_of_tars_is_said(tmp_path: Path) -> None:
    done = run_command(sys.executable, SCRIPT, tmp_path)
    assert done.returncode == 2
    assert "is no folder with .tar files" in done.stderr
    (tmp_path / "a.tar").write_bytes(b"no tar at all" * 100)
    done = run_command(sys.executable, SCRIPT, tmp_path)
    assert done.returncode == 2
    assert "is no whole tar" in done.stderr
    assert "Traceback" not in done.stderr
