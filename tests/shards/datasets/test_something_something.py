"""Something-Something V2: templates without brackets are labels, numbered by the labels file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from arvideo_ds.errors import UserError
from arvideo_ds.shards.datasets import Listing, Source, read_listing

MakeVideos = Callable[..., Path]
LABELS = {"Closing something": "1", "Moving something": "0", "Stacking number of something": "2"}
ROWS: tuple[object, ...] = (
    {"id": "74", "label": "moving a cup", "template": "Moving [something]"},
    {"id": "9", "label": "stacking 3 cups", "template": "Stacking [number of] [something]"},
    {"id": "100", "label": "closing a jar", "template": "Closing [something]"},
)
FILES = ("74.webm", "9.webm", "100.webm")


def read(
    videos: Path, rows: object, labels: object = LABELS, name: str = "list.json", **options: object
) -> Listing:
    annotations, names = videos.parent / name, videos.parent / "labels.json"
    annotations.write_text(json.dumps(rows), encoding="utf-8")
    names.write_text(json.dumps(labels), encoding="utf-8")
    return read_listing("ssv2", Source(videos, annotations, labels=names, **options))


def test_every_template_of_the_genuine_validation_head_is_one_of_174_labels(
    annotations: Path, make_videos: MakeVideos
) -> None:
    path = annotations / "ssv2" / "something-something-v2-validation.head.json"
    names = annotations / "ssv2" / "something-something-v2-labels.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    videos = make_videos(*(f"{row['id']}.webm" for row in rows))
    listing = read_listing("ssv2", Source(videos, path, labels=names))
    numbers = json.loads(names.read_text(encoding="utf-8"))
    assert listing.labels is not None
    assert {name: str(number) for number, name in enumerate(listing.labels)} == numbers
    assert len(listing.labels) == 174
    assert len(listing.entries) == len(rows) == 3000
    assert (listing.rejects, listing.notes) == ((), ())
    templates = {row["id"]: row["template"] for row in rows}
    for entry in listing.entries:
        unbracketed = templates[entry.video_id].translate({ord("["): None, ord("]"): None})
        assert entry.label_name == unbracketed
        assert entry.label_name in listing.labels


def test_the_genuine_test_head_needs_no_labels_and_names_what_is_missing(
    annotations: Path, make_videos: MakeVideos
) -> None:
    path = annotations / "ssv2" / "something-something-v2-test.head.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    videos = make_videos(*(f"part/{row['id']}.webm" for row in rows[:5]))
    listing = read_listing("ssv2", Source(videos, path))
    assert listing.labels is None
    assert [(e.video_id, e.label_name) for e in listing.entries] == sorted(
        (row["id"], None) for row in rows[:5]
    )
    assert [reject.source_path for reject in listing.rejects] == [row["id"] for row in rows[5:]]
    assert {reject.reason for reject in listing.rejects} == {"missing"}


def test_labels_are_numbered_by_the_file_and_the_ids_are_the_release_s(
    make_videos: MakeVideos,
) -> None:
    listing = read(make_videos("a/74.webm", "a/9.webm", "b/100.mp4", "b/5.webm"), ROWS)
    assert listing.labels == (
        "Moving something",
        "Closing something",
        "Stacking number of something",
    )
    assert [(e.video_id, e.source_path, e.label_name) for e in listing.entries] == [
        ("100", "b/100.mp4", "Closing something"),
        ("74", "a/74.webm", "Moving something"),
        ("9", "a/9.webm", "Stacking number of something"),
    ]
    assert listing.notes == ("3 classes; the published set has 174",)


def test_the_number_of_rows_is_compared_with_the_release(make_videos: MakeVideos) -> None:
    for split, rows in {"train": "168,913", "validation": "24,777", "test": "27,157"}.items():
        name = f"something-something-v2-{split}.json"
        listing = read(make_videos(*FILES), ROWS, name=name)
        assert f"3 rows in {name}; the published set has {rows}" in listing.notes


@pytest.mark.parametrize(
    "row",
    [
        {"id": "74", "template": "Flying [something]"},
        {"id": "74", "label": "moving a cup"},
        {"id": "74", "template": None},
        {"id": "74", "template": "moving [something]"},
        {"id": "seven", "template": "Moving [something]"},
        {"id": "../74", "template": "Moving [something]"},
        {"id": "", "template": "Moving [something]"},
        {"id": None, "template": "Moving [something]"},
        {"template": "Moving [something]"},
        "74",
        None,
    ],
)
@pytest.mark.parametrize("place", [1, 2])
def test_a_wrong_row_is_named_or_counted(make_videos: MakeVideos, row: object, place: int) -> None:
    rows = [*ROWS[1:]]
    rows.insert(place - 1, row)
    videos = make_videos(*FILES)
    with pytest.raises(UserError, match=rf"list\.json has 1 bad row.*entry {place}: "):
        read(videos, rows)
    listing = read(videos, rows, skip_bad_rows=True)
    assert [(r.source_path, r.reason) for r in listing.rejects] == [("list.json", "bad_row")]
    assert [(e.video_id, e.label_name) for e in listing.entries] == [
        ("100", "Closing something"),
        ("9", "Stacking number of something"),
    ]


def test_two_files_of_one_id_are_a_bad_row(make_videos: MakeVideos) -> None:
    videos = make_videos(*FILES, "again/9.webm")
    with pytest.raises(UserError, match=r"list\.json has 1 bad row.*entry 2: .*could be"):
        read(videos, ROWS)
    listing = read(videos, ROWS, skip_bad_rows=True)
    assert [e.video_id for e in listing.entries] == ["100", "74"]


def test_an_id_named_twice_is_a_bad_row_with_both_entries(make_videos: MakeVideos) -> None:
    videos, rows = make_videos(*FILES), [*ROWS, ROWS[1]]
    with pytest.raises(UserError, match=r"entry 4: '9' is already in entry 2"):
        read(videos, rows)
    assert len(read(videos, rows, skip_bad_rows=True).entries) == 3


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        ({"Moving something": "0", "Closing something": "2"}, r"not 0\.\.1"),
        ({"Moving something": "0", "Closing something": "0"}, r"not 0\.\.1"),
        ({"Moving something": "1", "Closing something": "2"}, r"not 0\.\.1"),
        ({"Moving something": "none"}, "not an integer"),
        ({"Moving something": None}, "not an integer"),
        (["Moving something"], "contains a list"),
    ],
)
def test_a_wrong_labels_file_is_refused(
    make_videos: MakeVideos, labels: object, match: str
) -> None:
    with pytest.raises(UserError, match=rf"labels\.json.*{match}"):
        read(make_videos(*FILES), ROWS[:1], labels=labels)


def test_labelled_rows_without_a_labels_file_and_no_json_are_refused(
    make_videos: MakeVideos, tmp_path: Path
) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS), encoding="utf-8")
    with pytest.raises(UserError, match="needs --labels"):
        read_listing("ssv2", Source(make_videos(*FILES), path))
    for text in ('{"id": "9"}', '[{"id": "9"}', ""):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=r"rows\.json"):
            read_listing("ssv2", Source(make_videos(*FILES), path))
