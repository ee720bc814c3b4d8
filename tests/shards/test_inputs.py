"""Inputs: every way to name videos gives the same ones, and what leads to none is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from arvideo_ds.cli import predict
from arvideo_ds.decoding.video import RejectedError
from arvideo_ds.errors import UserError
from arvideo_ds.shards.inputs import VideoList, list_videos
from arvideo_ds.shards.manifest import ShardSet


@pytest.fixture
def tree(demo_shards: Path, tmp_path: Path) -> Path:
    """a.mp4, sub/a.mp4, sub/a.avi (the same bytes), a text and a link to nothing."""
    root = tmp_path / "videos"
    (root / "sub").mkdir(parents=True)
    source = next((demo_shards / "videos").rglob("*.mp4"))
    for name in ("a.mp4", "sub/a.mp4", "sub/a.avi"):
        shutil.copy(source, root / name)
    (root / "notes.txt").write_text("no video")
    (root / "gone.mp4").symlink_to(root / "nowhere")
    return root


def keys(found: VideoList) -> list[str]:
    return [video.key for video in found.videos]


def test_a_folder_is_searched_at_any_depth_and_broken_links_are_counted(tree: Path) -> None:
    found = list_videos(str(tree))
    assert keys(found) == ["a.mp4", "sub/a.avi", "sub/a.mp4"]
    assert [(r.source_path, r.reason) for r in found.rejects] == [("gone.mp4", "missing")]


def test_files_of_a_folder_that_were_passed_over_are_counted(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tree / "sub" / "b.gif").write_bytes(b"GIF89a")
    assert list_videos(str(tree)).passed_over == {".gif": 1}
    assert len(list(predict.files([tree]))) == 4
    assert "1 files passed over" in capsys.readouterr().err


def test_a_list_names_files_and_parts_below_its_folder_or_another(tree: Path) -> None:
    csv, jsonl = tree / "list.csv", tree.parent / "list.jsonl"
    csv.write_text("path,label,start_s,stop_s\nsub/a.mp4,x,,\na.mp4,y,0.5,1\n")
    rows = [{"path": "sub/a.mp4", "label": "x"}, {"path": "a.mp4", "label": "y"}]
    rows[1].update(start_s=0.5, stop_s=1)  # type: ignore[call-overload]
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for found in (list_videos(str(csv)), list_videos(str(jsonl), videos=tree)):
        assert keys(found) == ["a.mp4_0.500_1.000", "sub/a.mp4"]
        assert [video.part for video in found.videos] == [(0.5, 1.0), None]
        assert [video.label for video in found.videos] == ["y", "x"]


@pytest.mark.parametrize("path", ["../outside.mp4", "/etc/passwd", "missing.mp4"])
def test_rows_that_lead_out_or_nowhere(path: str, tree: Path) -> None:
    (tree.parent / "outside.mp4").write_bytes(b"x")
    (tree / "list.csv").write_text(f"path\na.mp4\n{path}\n")
    if path != "missing.mp4":  # a reject, no bad row
        with pytest.raises(UserError, match=r"line 3: .*--skip_bad_rows"):
            list_videos(str(tree / "list.csv"))
    found = list_videos(str(tree / "list.csv"), skip_bad_rows=True)
    assert keys(found) == ["a.mp4"]
    reason = "missing" if path == "missing.mp4" else "bad_row"
    assert [reject.reason for reject in found.rejects] == [reason]


def test_one_file(tree: Path) -> None:
    assert keys(list_videos(str(tree / "sub" / "a.avi"))) == ["a.avi"]


def test_what_cannot_be_an_input(tree: Path) -> None:
    (tree / "twice.csv").write_text("path\na.mp4\na.mp4\n")
    with pytest.raises(UserError, match=r"line 3: 'a' is already in line 2"):
        list_videos(str(tree / "twice.csv"))
    with pytest.raises(UserError, match="does not exist"):
        list_videos(str(tree / "nowhere"))
    (tree / "empty").mkdir()
    with pytest.raises(UserError, match="no videos in"):
        list_videos(str(tree / "empty"))


def test_shards_give_every_sample_as_a_file_of_its_own(demo_shards: Path) -> None:
    found, shards = list_videos(str(demo_shards / "test")), ShardSet(demo_shards / "test")
    assert len(found.videos) == shards.num_samples
    assert found.identity == f"shards {shards.hash}"
    for video in found.videos[:3]:
        original = demo_shards / "videos" / "test" / str(video.label)
        with video.open() as member:
            data = member.read()
            member.seek(-5, 2)
            assert member.read(99) == data[-5:]
            assert member.tell() == video.num_bytes
        assert data in [path.read_bytes() for path in original.iterdir()]


def test_altered_bytes_and_empty_files_are_rejected(demo_shards: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(demo_shards / "test", tmp_path / "shards")
    video = list_videos(str(copy)).videos[0]
    tar = next(copy.glob("*.tar"))
    with tar.open("r+b") as file:
        offsets = {sample.key: sample.offset for sample in ShardSet(copy).index(0).samples}
        file.seek(offsets[video.key])
        file.write(b"?")
    with pytest.raises(RejectedError, match="altered"), video.open():
        pass
    (tmp_path / "empty.mp4").touch()
    (empty,) = list_videos(str(tmp_path / "empty.mp4")).videos
    with pytest.raises(RejectedError, match="empty"), empty.open():
        pass
