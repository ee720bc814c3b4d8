"""JSON lines read like the CSV, and parts of longer videos by seconds, from either."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arvideo_ds.errors import UserError
from arvideo_ds.shards.datasets import Listing, Source, read_listing, safe_key

MakeVideos = Callable[..., Path]
# Where str.splitlines() ends a line, but neither JSON nor a file read as text does. json.dumps
# escapes the first three and writes the others raw.
LINE_ENDS = "\x0b\x0c\x1c\x85\u2028\u2029"


def read_jsonl(videos: Path, *rows: object, **options: object) -> Listing:
    """Rows as objects, or as the text of their line."""
    lines = (r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in rows)
    path = videos.parent / "list.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return read_listing("jsonl", Source(videos, path, **options))


def read_csv(videos: Path, *rows: dict[str, object], **options: object) -> Listing:
    path = videos.parent / "list.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return read_listing("csv", Source(videos, path, **options))


READ = pytest.mark.parametrize("read", [read_jsonl, read_csv])


@pytest.fixture
def videos(make_videos: MakeVideos) -> Path:
    return make_videos("a/1.mp4", "a/2.webm", "b/x/3.MP4")


def test_json_lines_give_what_the_same_csv_gives(videos: Path) -> None:
    rows: list[dict[str, object]] = [
        {"path": "b/x/3.MP4", "label": "run, fast", "split": "train", "note": 'say "no"'},
        {"path": "a/1.mp4", "label": "jump", "split": "train", "note": ""},
        {"path": "a/2.webm", "label": "run, fast", "split": "test", "note": "ü"},
    ]
    for split in (None, "train", "test"):
        listing = read_jsonl(videos, *rows, split=split)
        assert listing == read_csv(videos, *rows, split=split)
        assert len(listing.entries) == sum(split in (None, row["split"]) for row in rows)
    assert read_jsonl(videos, *rows).labels == ("jump", "run, fast")
    with pytest.raises(UserError, match="split 'val'"):
        read_jsonl(videos, *rows, split="val")


def test_a_json_label_may_be_a_number_and_rows_need_none(videos: Path) -> None:
    listing = read_jsonl(videos, {"path": "a/1.mp4", "label": 0}, {"path": "a/2.webm", "label": 12})
    assert [entry.label_name for entry in listing.entries] == ["0", "12"]
    for rows in ([{"path": "a/1.mp4"}], [{"path": "a/1.mp4", "label": None}]):
        listing = read_jsonl(videos, *rows)
        assert (listing.labels, listing.entries[0].label_name) == (None, None)


def test_empty_lines_a_byte_order_mark_and_windows_line_ends_are_no_rows(videos: Path) -> None:
    path = videos.parent / "list.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"path": "a/1.mp4"}\r\n\r\n  \r\n{"path": "a/2.webm"}')
    listing = read_listing("jsonl", Source(videos, path))
    assert [entry.video_id for entry in listing.entries] == ["a/1", "a/2"]


@pytest.mark.parametrize("end", LINE_ENDS)
def test_a_line_ends_at_a_newline_alone(videos: Path, end: str) -> None:
    label = f"two{end}words"
    rows = ({"path": "a/1.mp4", "label": label}, {"path": "a/2.webm", "label": "run"})
    assert set(read_jsonl(videos, *rows).labels or ()) == {label, "run"}
    with pytest.raises(UserError, match=r"has 1 bad row.*line 3: "):
        read_jsonl(videos, *rows, "{")


@pytest.mark.parametrize(
    "row",
    [
        "{",
        "no json",
        '{"path": "a/2.webm", "label": "run"} {}',
        "null",
        '"a/2.webm"',
        '["a/2.webm", "run"]',
        '{"label": "run"}',
        '{"path": null, "label": "run"}',
        '{"path": 2, "label": "run"}',
        '{"path": "", "label": "run"}',
        '{"path": "a/2.webm", "label": ""}',
        '{"path": "a/2.webm", "label": null}',
        '{"path": "a/2.webm"}',
        '{"path": "a/2.webm", "label": ["run"]}',
        '{"path": "a/2.webm", "label": {"name": "run"}}',
        '{"path": "a", "label": "run"}',
        '{"path": "../list.jsonl", "label": "run"}',
        '{"path": "a/\\u0000.mp4", "label": "run"}',
        '{"path": "a/\\ud800.mp4", "label": "run"}',
        f'{{"path": "{"a" * 300}.mp4", "label": "run"}}',
        f'{{"path": "a/2.webm", "label": "run", "start_s": 0, "stop_s": {"9" * 400}}}',
        f'{{"path": "a/2.webm", "label": {"9" * 5000}}}',
    ],
    ids=lambda row: row[:40],
)
def test_a_wrong_line_is_named_or_counted(videos: Path, row: str) -> None:
    good = [{"path": "a/1.mp4", "label": "run"}, {"path": "b/x/3.MP4", "label": "jump"}]
    with pytest.raises(UserError, match=r"list\.jsonl has 1 bad row.*line 2: "):
        read_jsonl(videos, good[0], row, good[1])
    listing = read_jsonl(videos, good[0], row, good[1], skip_bad_rows=True)
    assert [entry.video_id for entry in listing.entries] == ["a/1", "b/x/3"]
    assert listing.labels == ("jump", "run")
    assert [(r.source_path, r.reason) for r in listing.rejects] == [("list.jsonl", "bad_row")]
    assert "line 2" in listing.rejects[0].message


def test_a_line_without_a_split_is_not_dropped_unsaid(videos: Path) -> None:
    rows = ({"path": "a/1.mp4", "split": "train"}, {"path": "a/2.webm"})
    with pytest.raises(UserError, match=r"list\.jsonl has 1 bad row.*line 2: "):
        read_jsonl(videos, *rows, split="train")
    assert len(read_jsonl(videos, *rows).entries) == 2


def test_rows_of_other_splits_need_no_label_and_no_file(videos: Path) -> None:
    listing = read_jsonl(
        videos,
        {"path": "a/1.mp4", "label": "run", "split": "train"},
        {"path": "a/2.webm", "split": "test"},
        {"path": "a/missing.mp4", "split": "test"},
        split="train",
    )
    assert [entry.label_name for entry in listing.entries] == ["run"]


@READ
def test_files_outside_and_links_that_lead_out_are_refused(
    make_videos: MakeVideos, videos: Path, read: Callable[..., Listing]
) -> None:
    outside = make_videos("4.mp4", folder="outside")
    (videos / "link.mp4").symlink_to(outside / "4.mp4")
    (videos / "folder").symlink_to(outside)
    wrong = ("link.mp4", "folder/4.mp4", "../outside/4.mp4")
    for path in (*wrong, str(outside / "4.mp4")):
        with pytest.raises(UserError, match="has 1 bad row"):
            read(videos, {"path": "a/1.mp4"}, {"path": path})
        listing = read(videos, {"path": "a/1.mp4"}, {"path": path}, skip_bad_rows=True)
        assert [entry.video_id for entry in listing.entries] == ["a/1"]
        assert [reject.reason for reject in listing.rejects] == ["bad_row"]


@READ
def test_a_part_has_its_seconds_and_an_id_of_its_own(
    videos: Path, read: Callable[..., Listing]
) -> None:
    listing = read(
        videos,
        {"path": "a/1.mp4", "label": "run", "start_s": 2.5, "stop_s": 10},
        {"path": "a/1.mp4", "label": "jump", "start_s": "0", "stop_s": "2.5"},
        {"path": "a/2.webm", "label": "jump", "start_s": "", "stop_s": ""},
    )
    assert [(e.video_id, e.source_path, e.label_name, e.part) for e in listing.entries] == [
        ("a/1_0.000_2.500", "a/1.mp4", "jump", (0.0, 2.5)),
        ("a/1_2.500_10.000", "a/1.mp4", "run", (2.5, 10.0)),
        ("a/2", "a/2.webm", "jump", None),
    ]
    assert len({safe_key(entry.video_id) for entry in listing.entries}) == 3


@READ
@pytest.mark.parametrize(
    ("start", "stop"),
    [
        (5, 5),
        (5, 4),
        (-1, 4),
        (5, ""),
        ("", 5),
        ("five", 6),
        ("nan", 5),
        (0, "nan"),
        (0, "inf"),
        ("0:05", "0:06"),
    ],
)
def test_a_wrong_part_is_named_or_counted(
    videos: Path, read: Callable[..., Listing], start: object, stop: object
) -> None:
    rows = (
        {"path": "a/1.mp4", "start_s": 0, "stop_s": 1},
        {"path": "a/1.mp4", "start_s": start, "stop_s": stop},
    )
    with pytest.raises(UserError, match=r"list\.\w+ has 1 bad row.*line [23]: start_s"):
        read(videos, *rows)
    listing = read(videos, *rows, skip_bad_rows=True)
    assert [entry.part for entry in listing.entries] == [(0, 1)]
    assert [reject.reason for reject in listing.rejects] == ["bad_row"]


@READ
def test_the_same_part_twice_is_a_bad_row(videos: Path, read: Callable[..., Listing]) -> None:
    row = {"path": "a/1.mp4", "start_s": 0, "stop_s": 1}
    with pytest.raises(UserError, match=r"1 bad row.*'a/1_0\.000_1\.000' is already in line \d"):
        read(videos, row, row)


@READ
def test_a_file_that_is_not_there_is_missing(videos: Path, read: Callable[..., Listing]) -> None:
    (videos / "dead.mp4").symlink_to(videos / "no.mp4")
    listing = read(videos, {"path": "a/1.mp4"}, {"path": "gone.mp4"}, {"path": "dead.mp4"})
    assert [entry.video_id for entry in listing.entries] == ["a/1"]
    found = [(reject.source_path, reject.reason) for reject in listing.rejects]
    assert found == [("gone.mp4", "missing"), ("dead.mp4", "missing")]


@READ
def test_a_circle_of_links_is_left_out_and_counted(
    videos: Path, read: Callable[..., Listing]
) -> None:
    (videos / "circle.mp4").symlink_to(videos / "circle.mp4")
    listing = read(videos, {"path": "a/1.mp4"}, {"path": "circle.mp4"}, skip_bad_rows=True)
    assert ([entry.video_id for entry in listing.entries], len(listing.rejects)) == (["a/1"], 1)


def test_null_in_json_is_no_part_and_a_list_or_one_side_alone_is_wrong(videos: Path) -> None:
    listing = read_jsonl(videos, {"path": "a/1.mp4", "start_s": None, "stop_s": None})
    assert listing.entries[0].part is None
    for wrong in ({"start_s": 1}, {"stop_s": 1}, {"start_s": [0], "stop_s": [1]}):
        with pytest.raises(UserError, match="line 1: start_s and stop_s must both be seconds"):
            read_jsonl(videos, {"path": "a/1.mp4", **wrong})


@given(
    parts=st.lists(
        st.tuples(st.integers(0, 10**7), st.integers(1, 10**6)), min_size=1, max_size=8, unique=True
    )
)
def test_parts_by_milliseconds_never_meet_and_keep_their_times(
    tmp_path_factory: pytest.TempPathFactory, parts: list[tuple[int, int]]
) -> None:
    videos = tmp_path_factory.mktemp("parts") / "videos"
    videos.mkdir()
    (videos / "long.mp4").write_bytes(b"x")
    times = [(start / 1000, (start + length) / 1000) for start, length in parts]
    rows = ({"path": "long.mp4", "start_s": start, "stop_s": stop} for start, stop in times)
    listing = read_jsonl(videos, *rows)
    assert sorted(entry.part or (0, 0) for entry in listing.entries) == sorted(times)
    assert len({safe_key(entry.video_id) for entry in listing.entries}) == len(times)
