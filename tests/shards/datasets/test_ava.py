"""AVA: a window of seconds for each labelled second, boxes as lines of the annotations file."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from arvideo_ds.errors import UserError
from arvideo_ds.shards.datasets import Listing, Source, read_listing

MakeVideos = Callable[..., Path]
BOX = "0.1,0.2,0.6,0.9"
ROWS = (
    f"film-a,0910,{BOX},12,0",
    f"film-b,0902,{BOX},80,1",
    f"film-a,0910,{BOX},79,1",
    f"film-a,0911,{BOX},1,0",
)


def read(videos: Path, *rows: str, excluded: tuple[str, ...] = (), **options: object) -> Listing:
    path, left_out = videos.parent / "ava_val.csv", videos.parent / "excluded.csv"
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    left_out.write_text("".join(f"{row}\n" for row in excluded), encoding="utf-8")
    return read_listing("ava", Source(videos, path, excluded=left_out, **options))


def lines_of(listing: Listing) -> dict[str, list[int]]:
    return {entry.video_id: entry.facts["boxes"]["lines"] for entry in listing.entries}


def keyframe(row: str) -> str:
    video_id, second = row.split(",")[:2]
    return f"{video_id}_{second}"


@pytest.mark.parametrize("name", ["ava_val_v2.2_head.csv", "mmaction2_ava_sample.csv"])
def test_every_genuine_row_is_a_box_of_its_own_second(
    annotations: Path, make_videos: MakeVideos, name: str
) -> None:
    path = annotations / "ava" / name
    rows = path.read_text(encoding="utf-8").splitlines()
    films = {row.split(",")[0] for row in rows}
    videos = make_videos(*(f"{film}.mkv" for film in films))
    listing = read_listing("ava", Source(videos, path, first_second=900))
    # No row is malformed, and every row is a box of exactly one sample.
    assert (listing.rejects, listing.notes, listing.labels) == ((), (), None)
    assert {entry.video_id for entry in listing.entries} == set(map(keyframe, rows))
    lines = lines_of(listing)
    assert sorted(line for own in lines.values() for line in own) == [*range(1, len(rows) + 1)]
    for entry in listing.entries:
        assert {keyframe(rows[line - 1]) for line in lines[entry.video_id]} == {entry.video_id}
        assert entry.facts["boxes"]["file"] == name
        assert entry.facts["boxes"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert entry.part is not None
        assert sum(entry.part) / 2 == entry.facts["second"] - 900
        assert entry.part[1] - entry.part[0] == 3


def test_genuine_excluded_seconds_are_left_out(annotations: Path, make_videos: MakeVideos) -> None:
    path = annotations / "ava" / "mmaction2_ava_sample.csv"
    excluded = annotations / "ava" / "mmaction2_ava_excluded_timestamps_sample.csv"
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    videos = make_videos(*(f"{row[0]}.mp4" for row in rows))
    listing = read_listing("ava", Source(videos, path, excluded=excluded))
    gone = {line.replace(",", "_") for line in excluded.read_text(encoding="utf-8").splitlines()}
    named = [f"{row[0]}_{row[1]}" for row in rows]
    assert {entry.video_id for entry in listing.entries} == set(named) - gone
    assert gone & set(named)
    count = sum(name in gone for name in named)
    assert listing.notes == (f"{count} rows of excluded seconds skipped",)


def test_a_sample_is_a_labelled_second_with_all_its_rows(make_videos: MakeVideos) -> None:
    listing = read(make_videos("film-a.mp4", "sub/film-b.webm", "film-c.mp4"), *ROWS)
    assert lines_of(listing) == {"film-a_0910": [1, 3], "film-a_0911": [4], "film-b_0902": [2]}
    assert [(e.source_path, e.label_name, e.facts["second"]) for e in listing.entries] == [
        ("film-a.mp4", None, 910),
        ("film-a.mp4", None, 911),
        ("sub/film-b.webm", None, 902),
    ]


def test_lines_count_empty_lines_and_leave_excluded_and_bad_rows_out(
    make_videos: MakeVideos,
) -> None:
    rows = ("", ROWS[0], "", "broken", ROWS[1], ROWS[2])
    listing = read(
        make_videos("film-a.mp4", "film-b.mp4"), *rows, excluded=("film-b,902",), skip_bad_rows=True
    )
    assert lines_of(listing) == {"film-a_0910": [2, 6]}
    assert listing.notes == ("1 rows of excluded seconds skipped",)


@pytest.mark.parametrize(
    ("first_second", "window_s", "part"),
    [
        (0, 3, (908.5, 911.5)),
        (900, 3, (8.5, 11.5)),
        (900, 2, (9, 11)),
        (910, 3, (0, 1.5)),
        (909.5, 4, (0, 2.5)),
    ],
)
def test_the_window_lies_around_the_second_and_never_before_the_film(
    make_videos: MakeVideos, first_second: float, window_s: float, part: tuple[float, float]
) -> None:
    listing = read(make_videos("film-a.mp4"), ROWS[0], first_second=first_second, window_s=window_s)
    assert listing.entries[0].part == part
    # Where in the window the second is: in its middle, unless it begins with the film.
    assert part[0] + listing.entries[0].facts["keyframe_s"] == 910 - first_second


def test_a_second_before_the_film_s_first_is_refused(make_videos: MakeVideos) -> None:
    with pytest.raises(UserError, match=r"second 902 of film-b .*--first_second 950"):
        read(make_videos("film-b.mp4"), ROWS[1], first_second=950)


def test_a_film_that_is_missing_is_one_reject_with_its_first_line(make_videos: MakeVideos) -> None:
    listing = read(make_videos("film-b.mp4"), *ROWS)
    assert lines_of(listing) == {"film-b_0902": [2]}
    assert [(r.source_path, r.reason) for r in listing.rejects] == [("film-a", "missing")]
    assert "line 1 " in listing.rejects[0].message


@pytest.mark.parametrize(
    "row",
    [
        "film-a,0906,0.175,0.001,0.995,1.000,80,3_",  # as in a copy that is about
        f"film-a,0901,{BOX},12,0",
        f"film-a,1799,{BOX},12,0",
        f"film-a,903.5,{BOX},12,0",
        f"film-a,,{BOX},12,0",
        f"film-a,0903,{BOX},0,0",
        f"film-a,0903,{BOX},81,0",
        f"film-a,0903,{BOX},,0",
        f"film-a,0903,{BOX},12",
        f"film-a,0903,{BOX},12,0,0",
        f",0903,{BOX},12,0",
        "film-a,0903,0.6,0.2,0.1,0.9,12,0",
        "film-a,0903,0.1,0.2,0.6,1.1,12,0",
        "film-a,0903,-0.1,0.2,0.6,0.9,12,0",
        "film-a,0903,0.1,nan,0.6,0.9,12,0",
        "film-a,0903,,,,,,",
        "video_id,second,x1,y1,x2,y2,action_id,person_id",
    ],
)
def test_a_wrong_row_is_named_or_counted(make_videos: MakeVideos, row: str) -> None:
    videos = make_videos("film-a.mp4")
    with pytest.raises(UserError, match=r"ava_val\.csv has 1 bad row.*line 2: "):
        read(videos, ROWS[0], row, ROWS[2])
    listing = read(videos, ROWS[0], row, ROWS[2], skip_bad_rows=True)
    assert lines_of(listing) == {"film-a_0910": [1, 3]}
    assert [(r.source_path, r.reason) for r in listing.rejects] == [("ava_val.csv", "bad_row")]


@pytest.mark.parametrize("row", ["film-a", "film-a,", "film-a,0901", "film-a,ten", "film-a,0910,1"])
def test_a_wrong_row_of_the_excluded_seconds_is_named_or_counted(
    make_videos: MakeVideos, row: str
) -> None:
    videos, excluded = make_videos("film-a.mp4"), ("film-a,0911", row)
    with pytest.raises(UserError, match=r"excluded\.csv has 1 bad row.*line 2: "):
        read(videos, ROWS[0], excluded=excluded)
    listing = read(videos, ROWS[0], ROWS[3], excluded=excluded, skip_bad_rows=True)
    assert lines_of(listing) == {"film-a_0910": [1]}
    assert [(r.source_path, r.reason) for r in listing.rejects] == [("excluded.csv", "bad_row")]


def test_two_files_of_one_film_are_a_bad_row(make_videos: MakeVideos) -> None:
    videos = make_videos("film-a.mp4", "film-a.mkv", "film-b.mp4")
    with pytest.raises(UserError, match=r"ava_val\.csv has 2 bad row.*line 1: .*could be.*line 4"):
        read(videos, *ROWS)
    listing = read(videos, *ROWS, skip_bad_rows=True)
    assert lines_of(listing) == {"film-b_0902": [2]}
    assert {reject.reason for reject in listing.rejects} == {"bad_row"}


def test_the_order_is_that_of_the_ids_whatever_the_rows_order(make_videos: MakeVideos) -> None:
    videos = make_videos("film-a.mp4", "film-b.mp4")
    ids = [entry.video_id for entry in read(videos, *ROWS).entries]
    assert ids == sorted(ids)
    assert ids == [entry.video_id for entry in read(videos, *reversed(ROWS)).entries]
