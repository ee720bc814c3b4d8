"""UCF101: the lists of the release, numbers of classInd.txt, class folders or none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from arvideo_ds.errors import UserError
from arvideo_ds.shards.datasets import Listing, Source, read_listing

MakeVideos = Callable[..., Path]
CLASSES = ("1 Zumba", "2 Archery", "3 Bowling")
TRAIN = ("Archery/v_Archery_g02_c01.avi 2", "Zumba/v_Zumba_g01_c01.avi 1")
TEST = ("Zumba/v_Zumba_g09_c01.avi", "Bowling/v_Bowling_g09_c02.avi")


def read(
    videos: Path,
    rows: tuple[str, ...] = TRAIN,
    split: str | None = "train1",
    classes: tuple[str, ...] = CLASSES,
    **options: object,
) -> Listing:
    lists = videos.parent / "ucfTrainTestlist"
    lists.mkdir(exist_ok=True)
    name = "testlist01.txt" if split == "test1" else "trainlist01.txt"
    for path, lines in ((lists / "classInd.txt", classes), (lists / name, rows)):
        # The release's lines end in CR LF.
        path.write_bytes("".join(f"{line}\r\n" for line in lines).encode())
    return read_listing("ucf101", Source(videos, lists, split, **options))


@pytest.mark.parametrize(("split", "rows"), [("train1", 9537), ("test1", 3783)])
@pytest.mark.parametrize("nested", [True, False])
def test_split_1_of_the_genuine_lists_has_the_published_counts(
    annotations: Path, make_videos: MakeVideos, split: str, rows: int, nested: bool
) -> None:
    lists = annotations / "ucf101"
    text = (lists / f"{split[:-1]}list01.txt").read_text(encoding="utf-8")
    names = [line.split()[0] for line in text.splitlines()]
    files = names if nested else [name.split("/")[1] for name in names]
    listing = read_listing("ucf101", Source(make_videos(*files), lists, split))
    assert len(listing.entries) == len(names) == rows
    assert (listing.rejects, listing.notes) == ((), ())
    assert [entry.source_path for entry in listing.entries] == sorted(files)
    labels = dict(zip(files, (name.split("/")[0] for name in names), strict=True))
    assert {entry.source_path: entry.label_name for entry in listing.entries} == labels
    class_lines = (lists / "classInd.txt").read_text(encoding="utf-8").splitlines()
    assert listing.labels is not None
    assert [f"{n} {name}" for n, name in enumerate(listing.labels, 1)] == class_lines
    assert len(listing.labels) == 101


def test_train_and_test_of_the_genuine_split_share_no_clip_and_no_group(annotations: Path) -> None:
    groups = []
    for name in ("trainlist01.txt", "testlist01.txt"):
        lines = (annotations / "ucf101" / name).read_text(encoding="utf-8").splitlines()
        groups.append({line.split()[0].rpartition("_")[0] for line in lines})
    assert not groups[0] & groups[1]


def test_the_numbers_are_those_of_the_class_list_counted_from_zero(
    make_videos: MakeVideos,
) -> None:
    videos = make_videos("Archery/v_Archery_g02_c01.avi", "v_Zumba_g01_c01.mp4", "v_Zumba_g09.avi")
    listing = read(videos)
    assert listing.labels == ("Zumba", "Archery", "Bowling")
    assert [(e.video_id, e.label_name) for e in listing.entries] == [
        ("Archery/v_Archery_g02_c01", "Archery"),
        ("v_Zumba_g01_c01", "Zumba"),
    ]
    assert listing.notes == (
        "3 classes; the published set has 101",
        "2 rows in trainlist01.txt; the published set has 9,537",
    )


def test_lists_without_numbers_take_the_label_from_the_folder_s_name(
    make_videos: MakeVideos,
) -> None:
    listing = read(make_videos("v_Zumba_g09_c01.avi"), TEST, "test1")
    assert [(e.video_id, e.label_name) for e in listing.entries] == [("v_Zumba_g09_c01", "Zumba")]
    assert [(r.source_path, r.reason) for r in listing.rejects] == [
        ("Bowling/v_Bowling_g09_c02.avi", "missing")
    ]
    assert "line 2" in listing.rejects[0].message


def test_of_two_files_of_one_name_that_of_the_class_is_taken(make_videos: MakeVideos) -> None:
    videos = make_videos("Zumba/v_Zumba_g01_c01.avi", "Archery/v_Zumba_g01_c01.avi")
    assert [e.source_path for e in read(videos).entries] == ["Zumba/v_Zumba_g01_c01.avi"]
    videos = make_videos("x/v_Zumba_g01_c01.avi", "y/v_Zumba_g01_c01.avi", folder="strange")
    with pytest.raises(UserError, match=r"trainlist01\.txt has 1 bad row.*line 2: .*could be"):
        read(videos)


@pytest.mark.parametrize(
    "row",
    [
        "Zumba/v_Zumba_g01_c01.avi 2",
        "Zumba/v_Zumba_g01_c01.avi one",
        "Zumba/v_Zumba_g01_c01.avi 0",
        "Dance/v_Dance_g01_c01.avi 1",
        "v_Zumba_g01_c01.avi 1",
        "Zumba/v_Zumba g01_c01.avi 1 1",
        "/v_Zumba_g01_c01.avi",
        "1",
    ],
)
def test_a_wrong_row_is_named_or_counted(make_videos: MakeVideos, row: str) -> None:
    videos = make_videos("v_Zumba_g01_c01.avi", "v_Archery_g02_c01.avi")
    rows = (TRAIN[0], row)
    with pytest.raises(UserError, match=r"trainlist01\.txt has 1 bad row.*line 2: "):
        read(videos, rows)
    listing = read(videos, rows, skip_bad_rows=True)
    assert [entry.video_id for entry in listing.entries] == ["v_Archery_g02_c01"]
    assert [(r.source_path, r.reason) for r in listing.rejects] == [("trainlist01.txt", "bad_row")]


@pytest.mark.parametrize("classes", [("1 Zumba", "3 Archery"), ("0 Zumba",), ("1 Zumba", "2")])
def test_a_wrong_class_list_is_refused_by_file_and_line(
    make_videos: MakeVideos, classes: tuple[str, ...]
) -> None:
    with pytest.raises(UserError, match=rf"classInd\.txt line {len(classes)}: "):
        read(make_videos("v_Zumba_g01_c01.avi"), classes=classes)


@pytest.mark.parametrize("split", [None, "train", "train4", "val1"])
def test_a_split_that_is_none_of_the_six_is_refused(
    make_videos: MakeVideos, split: str | None
) -> None:
    with pytest.raises(UserError, match="needs --split"):
        read(make_videos("v_Zumba_g01_c01.avi"), split=split)


def test_a_split_whose_list_is_not_there_is_refused(make_videos: MakeVideos) -> None:
    with pytest.raises(UserError, match=r"cannot read .*trainlist03\.txt"):
        read(make_videos("v_Zumba_g01_c01.avi"), split="train3")


def test_a_clip_named_twice_is_a_bad_row_with_both_lines(make_videos: MakeVideos) -> None:
    videos = make_videos(*(row.split()[0] for row in TRAIN))
    rows = (*TRAIN, TRAIN[1])
    with pytest.raises(UserError, match=r"line 3: 'v_Zumba_g01_c01' is already in line 2"):
        read(videos, rows)
    assert len(read(videos, rows, skip_bad_rows=True).entries) == 2
