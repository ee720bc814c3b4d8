"""Diving48: rows of the JSON lists, labels numbered by the vocabulary."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from arvideo_ds.errors import UserError
from arvideo_ds.shards.datasets import Listing, Source, read_listing

MakeVideos = Callable[..., Path]
VOCABULARY = [["Back", "15som", "05Twis", "FREE"], ["Back", "Dive", "NoTwis", "PIKE"], "Reverse"]
NAMES = ("Back 15som 05Twis FREE", "Back Dive NoTwis PIKE", "Reverse")
ROWS: tuple[object, ...] = (
    {"vid_name": "b_-1_00002", "label": 1, "start_frame": 0, "end_frame": 129},
    {"vid_name": "_a-0_00001", "label": 0, "start_frame": 0, "end_frame": 90},
    {"vid_name": "c_00003", "label": 2, "start_frame": 0, "end_frame": 90},
)
FILES = ("b_-1_00002.mp4", "_a-0_00001.mp4", "c_00003.mp4")


def read(
    videos: Path, rows: object = ROWS, vocabulary: object = VOCABULARY, **options: object
) -> Listing:
    path, labels = videos.parent / "train.json", videos.parent / "vocab.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    labels.write_text(json.dumps(vocabulary), encoding="utf-8")
    return read_listing("diving48", Source(videos, path, labels=labels, **options))


def test_the_labels_are_the_vocabulary_s_entries_in_its_order(make_videos: MakeVideos) -> None:
    listing = read(make_videos(*FILES, "d_00004.mp4"))
    assert listing.labels == NAMES
    assert [(e.video_id, e.label_name) for e in listing.entries] == [
        ("_a-0_00001", NAMES[0]),
        ("b_-1_00002", NAMES[1]),
        ("c_00003", NAMES[2]),
    ]
    assert listing.notes == ("3 classes; the published set has 48",)
    assert listing.rejects == ()


def test_48_classes_are_the_published_number(make_videos: MakeVideos) -> None:
    vocabulary = [["Back", f"{number}som", "05Twis", "FREE"] for number in range(48)]
    assert read(make_videos(*FILES), vocabulary=vocabulary).notes == ()


def test_clips_that_are_not_there_are_missing(make_videos: MakeVideos) -> None:
    listing = read(make_videos(f"rgb/{FILES[1]}"))
    assert [entry.source_path for entry in listing.entries] == [f"rgb/{FILES[1]}"]
    assert [(r.source_path, r.reason) for r in listing.rejects] == [
        ("b_-1_00002", "missing"),
        ("c_00003", "missing"),
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"vid_name": "c_00003", "label": 3},
        {"vid_name": "c_00003", "label": -1},
        {"vid_name": "c_00003", "label": "2"},
        {"vid_name": "c_00003", "label": 1.0},
        {"vid_name": "c_00003", "label": None},
        {"vid_name": "c_00003"},
        {"vid_name": "", "label": 2},
        {"vid_name": None, "label": 2},
        {"label": 2},
        ["c_00003", 2],
        "c_00003",
        None,
    ],
)
def test_a_wrong_row_is_named_or_counted(make_videos: MakeVideos, row: object) -> None:
    videos, rows = make_videos(*FILES), [ROWS[0], row, ROWS[1]]
    with pytest.raises(UserError, match=r"train\.json has 1 bad row.*entry 2: "):
        read(videos, rows)
    listing = read(videos, rows, skip_bad_rows=True)
    assert [(r.source_path, r.reason) for r in listing.rejects] == [("train.json", "bad_row")]
    assert [entry.video_id for entry in listing.entries] == ["_a-0_00001", "b_-1_00002"]


def test_two_files_of_one_name_are_a_bad_row(make_videos: MakeVideos) -> None:
    videos = make_videos(*(f"a/{name}" for name in FILES), f"b/{FILES[2]}")
    with pytest.raises(UserError, match=r"train\.json has 1 bad row.*entry 3: .*could be"):
        read(videos)
    assert len(read(videos, skip_bad_rows=True).entries) == 2


def test_a_clip_named_twice_is_a_bad_row_with_both_entries(make_videos: MakeVideos) -> None:
    videos, rows = make_videos(*FILES), [*ROWS, ROWS[2]]
    with pytest.raises(UserError, match=r"entry 4: 'c_00003' is already in entry 3"):
        read(videos, rows)
    assert len(read(videos, rows, skip_bad_rows=True).entries) == 3


def test_no_vocabulary_and_files_of_another_kind_are_refused(make_videos: MakeVideos) -> None:
    videos = make_videos(*FILES)
    with pytest.raises(UserError, match=r"vocab\.json contains a dict"):
        read(videos, vocabulary={"0": "Back"})
    with pytest.raises(UserError, match=r"train\.json contains a dict"):
        read(videos, rows={"vid_name": "c_00003", "label": 0})
    with pytest.raises(UserError, match="needs --labels"):
        read_listing("diving48", Source(videos, videos.parent / "train.json"))
