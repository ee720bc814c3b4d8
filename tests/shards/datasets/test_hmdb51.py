"""HMDB51: the three splits of the release, flags of its rows, strange file names, class folders."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from arvideo_ds.errors import UserError
from arvideo_ds.shards.datasets import Listing, Source, read_listing

MakeVideos = Callable[..., Path]
SPLITS = "testTrainMulti_7030_splits"
# Names of the release hold such characters.
ODD = "-_Ball_#2_(Timo_3)_&_[x]_%20_catch_f_cm.bad.0"
ROWS = {
    "catch": (f"{ODD}.avi 1 ", "b_catch_1.avi 2 ", "c_catch_2.avi 0 "),
    "catch_fish": ("d_fish_1.avi 1", "e_fish_2.avi 2"),
}


def write_splits(folder: Path, rows: dict[str, tuple[str, ...]], number: int = 1) -> Path:
    splits = folder / SPLITS
    splits.mkdir(exist_ok=True)
    for label, lines in rows.items():
        text = "".join(f"{line}\n" for line in lines)
        (splits / f"{label}_test_split{number}.txt").write_text(text, encoding="utf-8")
    return splits


def read(
    videos: Path, rows: dict[str, tuple[str, ...]], split: str | None = "train1", **options: object
) -> Listing:
    return read_listing(
        "hmdb51", Source(videos, write_splits(videos.parent, rows), split, **options)
    )


@pytest.fixture(scope="module")
def genuine(annotations: Path, tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Every clip that the genuine split files name, in class folders."""
    videos, splits = tmp_path_factory.mktemp("hmdb51"), annotations / "hmdb51" / SPLITS
    for path in splits.glob("*_test_split1.txt"):
        folder = videos / path.name.removesuffix("_test_split1.txt")
        folder.mkdir()
        for line in path.read_text(encoding="utf-8").splitlines():
            (folder / line.rsplit(maxsplit=1)[0]).write_bytes(b"x")
    return Source(videos, splits)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_genuine_splits_have_the_published_counts_and_share_no_clip(
    genuine: Source, number: int
) -> None:
    parts: dict[str, Listing] = {
        part: read_listing("hmdb51", Source(genuine.videos, genuine.annotations, f"{part}{number}"))
        for part in ("train", "test")
    }
    assert {part: len(listing.entries) for part, listing in parts.items()} == {
        "train": 3570,
        "test": 1530,
    }
    for part, listing in parts.items():
        assert listing.labels is not None
        assert (listing.rejects, listing.notes) == ((), ())
        assert len(listing.labels) == 51
        assert list(listing.labels) == sorted(listing.labels)
        per_class = [entry.label_name for entry in listing.entries]
        assert {per_class.count(label) for label in listing.labels} == {
            70 if part == "train" else 30
        }
        for entry in listing.entries:
            assert entry.source_path.split("/")[0] == entry.label_name
    train, test = ({entry.path for entry in listing.entries} for listing in parts.values())
    assert not train & test


def test_of_the_genuine_rows_the_clips_that_are_not_there_are_named(
    genuine: Source, make_videos: MakeVideos
) -> None:
    assert genuine.annotations is not None
    first = (genuine.annotations / "catch_test_split1.txt").read_text(encoding="utf-8")
    name = re.match(r"(.*) 1 *$", first, re.MULTILINE)
    assert name is not None
    listing = read_listing("hmdb51", Source(make_videos(name[1]), genuine.annotations, "train1"))
    assert [(e.source_path, e.label_name) for e in listing.entries] == [(name[1], "catch")]
    assert len(listing.rejects) == 3569
    assert {reject.reason for reject in listing.rejects} == {"missing"}
    assert len(listing.labels or ()) == 51  # the numbers do not hang on what is there
    assert listing.notes == ()


def test_1_is_train_2_is_test_and_0_is_neither(make_videos: MakeVideos) -> None:
    names = (f"{ODD}.avi", "b_catch_1.avi", "c_catch_2.avi", "d_fish_1.avi", "e_fish_2.avi")
    videos = make_videos(*names)
    train, test = read(videos, ROWS, "train1"), read(videos, ROWS, "test1")
    assert [(e.source_path, e.label_name) for e in train.entries] == [
        (f"{ODD}.avi", "catch"),
        ("d_fish_1.avi", "catch_fish"),
    ]
    assert [(e.source_path, e.label_name) for e in test.entries] == [
        ("b_catch_1.avi", "catch"),
        ("e_fish_2.avi", "catch_fish"),
    ]
    assert train.notes == (
        "2 classes; the published set has 51",
        "2 clips in train1; the published set has 3,570",
    )


def test_the_classes_are_numbered_by_name_in_every_split(make_videos: MakeVideos) -> None:
    # Sorted as file names, catch_fish_test... would stand before catch_test...
    videos = make_videos(f"{ODD}.avi", "b_catch_1.avi", "d_fish_1.avi")
    for split in ("train1", "test1"):
        assert read(videos, ROWS, split).labels == ("catch", "catch_fish")


def test_a_number_takes_the_files_of_that_split_alone(make_videos: MakeVideos) -> None:
    videos = make_videos("a.avi", "b.avi")
    write_splits(videos.parent, {"wave": ("a.avi 2", "b.avi 1")}, number=2)
    listing = read(videos, {"wave": ("a.avi 1", "b.avi 2")}, "train2")
    assert [entry.source_path for entry in listing.entries] == ["b.avi"]


def test_of_two_files_of_one_name_that_of_the_class_is_taken(make_videos: MakeVideos) -> None:
    videos = make_videos("catch/clip.avi", "wave/clip.avi")
    rows = {"catch": ("clip.avi 1",), "wave": ("clip.avi 1",)}
    assert [(e.video_id, e.label_name) for e in read(videos, rows).entries] == [
        ("catch/clip", "catch"),
        ("wave/clip", "wave"),
    ]


def test_two_files_of_one_name_in_strange_folders_are_a_bad_row(make_videos: MakeVideos) -> None:
    videos = make_videos("x/clip.avi", "y/clip.avi", "wave/other.avi")
    rows = {"wave": ("other.avi 1", "clip.avi 1")}
    with pytest.raises(UserError, match=r"wave_test_split1\.txt has 1 bad row.*line 2: .*could be"):
        read(videos, rows)
    assert [e.video_id for e in read(videos, rows, skip_bad_rows=True).entries] == ["wave/other"]


@pytest.mark.parametrize("row", ["clip.avi 3", "clip.avi", "clip.avi one", "1", "clip.avi -1"])
def test_a_wrong_row_is_named_or_counted(make_videos: MakeVideos, row: str) -> None:
    videos = make_videos("clip.avi", "other.avi")
    rows = {"wave": ("other.avi 1", "", row)}
    with pytest.raises(UserError, match=r"wave_test_split1\.txt has 1 bad row.*line 3: "):
        read(videos, rows)
    listing = read(videos, rows, skip_bad_rows=True)
    assert [entry.video_id for entry in listing.entries] == ["other"]
    assert [(r.source_path, r.reason) for r in listing.rejects] == [
        ("wave_test_split1.txt", "bad_row")
    ]


@pytest.mark.parametrize("split", [None, "train", "train4", "val1", "train11"])
def test_a_split_that_is_none_of_the_six_is_refused(
    make_videos: MakeVideos, split: str | None
) -> None:
    with pytest.raises(UserError, match="needs --split"):
        read(make_videos("a.avi"), {"wave": ("a.avi 1",)}, split)


def test_a_folder_without_split_files_is_refused(make_videos: MakeVideos) -> None:
    with pytest.raises(UserError, match=r"no files <class>_test_split3\.txt"):
        read(make_videos("a.avi"), {"wave": ("a.avi 1",)}, "train3")


def test_a_clip_named_twice_is_a_bad_row_with_both_lines(make_videos: MakeVideos) -> None:
    videos = make_videos("a.avi", "b.avi")
    rows = {"catch": ("a.avi 1", "b.avi 1", "a.avi 1")}
    with pytest.raises(UserError, match=r"1 bad row.*line 3: 'a' is already in line 1"):
        read(videos, rows)
    assert len(read(videos, rows, skip_bad_rows=True).entries) == 2
