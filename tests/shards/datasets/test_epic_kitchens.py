"""EPIC-KITCHENS-100: a part of a long video for each narrated action, verbs as labels."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from arvideo_ds.decoding.video import TranscodeSettings, encode, read_frames
from arvideo_ds.errors import UserError
from arvideo_ds.shards.datasets import Listing, Source, read_listing
from arvideo_ds.shards.datasets.epic_kitchens import _seconds

BLACK, LEVELS = 20, 200

MakeVideos = Callable[..., Path]
HEADER = (
    "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,"
    "start_frame,stop_frame,narration,verb,verb_class,noun,noun_class,all_nouns,all_noun_classes"
)
TEST_HEADER = (
    "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,"
    "start_frame,stop_frame"
)
VERBS = "id,key,instances,category\n0,take,\"['grab', 'take']\",retrieve\n1,put,['put'],leave\n"


def row(
    action: str = "P02_11_0",
    start: str = "00:00:01.50",
    stop: str = "00:00:03.25",
    verb: str = "1",
    noun: str = "7",
    video: str = "P02_11",
) -> str:
    times = f"{action},P02,{video},00:00:01.089,{start},{stop},90,195"
    return f'{times},"put cup, then go",put,{verb},cup,{noun},"[\'cup\', \'lid\']","[7, 12]"'


def read(
    videos: Path, *rows: str, header: str = HEADER, name: str = "list.csv", **options: object
) -> Listing:
    path = videos.parent / name
    path.write_text("".join(f"{line}\n" for line in (header, *rows)), encoding="utf-8")
    return read_listing("epic_kitchens", Source(videos, path, **options))


@pytest.mark.parametrize(
    ("start", "stop", "part"),
    [
        ("00:00:00.14", "00:00:03.37", (0.14, 3.37)),
        ("00:01:00.00", "00:02:30.5", (60, 150.5)),
        ("01:02:03.04", "10:00:00", (3723.04, 36000)),
        ("00:00:09.99", "00:00:10.001", (9.99, 10.001)),
    ],
)
def test_a_sample_is_the_part_between_its_times_in_seconds(
    make_videos: MakeVideos, start: str, stop: str, part: tuple[float, float]
) -> None:
    listing = read(make_videos("P02/P02_11.MP4"), row(start=start, stop=stop))
    (entry,) = listing.entries
    assert entry.part == pytest.approx(part)
    assert (entry.video_id, entry.source_path) == ("P02_11_0", "P02/P02_11.MP4")


def numbered_video(path: Path, rate: Fraction, frames: int) -> None:
    """H.264 in which the brightness of a frame is its number."""
    pictures = (
        av.VideoFrame.from_ndarray(np.full((24, 16), BLACK + n % LEVELS, np.uint8), "yuv420p")
        for n in range(frames)
    )
    path.write_bytes(encode(pictures, rate=rate, settings=TranscodeSettings(gop=8, crf=1)))


def cut_numbers(path: Path, part: tuple[float, float]) -> list[int]:
    """The numbers of the frames that a part has, less whole multiples of `LEVELS`."""
    with path.open("rb") as file, read_frames(file, part) as (_, frames):
        return [bytes(frame.planes[0])[0] - BLACK for frame in frames]


@pytest.mark.parametrize(
    ("rate", "start", "stop", "first", "last"),
    [
        # A frame belongs to the action when start <= number / rate < stop.
        (Fraction(25), "00:00:01.50", "00:00:03.25", 38, 81),
        (Fraction(50), "00:00:01.50", "00:00:03.25", 75, 162),
        (Fraction(60000, 1001), "00:00:01.50", "00:00:03.25", 90, 194),
        # Times of frames themselves: the first belongs, the one at the stop does not.
        (Fraction(25), "00:00:02.00", "00:00:02.04", 50, 50),
        (Fraction(50), "00:00:02.86", "00:00:03.88", 143, 193),
        # 600 frames of 60000/1001 are 10.01 s.
        (Fraction(60000, 1001), "00:00:10.01", "00:00:10.03", 600, 601),
        # Minutes and seconds added in floats are not the float of their sum.
        (Fraction(25), "00:01:08.96", "00:01:09.12", 1724, 1727),
        (Fraction(25), "00:01:08.88", "00:01:08.96", 1722, 1723),
    ],
)
def test_times_become_exactly_these_frames(
    make_videos: MakeVideos, rate: Fraction, start: str, stop: str, first: int, last: int
) -> None:
    videos = make_videos("P02_11.MP4")
    numbered_video(videos / "P02_11.MP4", rate, last + 20)
    (entry,) = read(videos, row(start=start, stop=stop)).entries
    assert entry.part is not None
    expected = [number % LEVELS for number in range(first, last + 1)]
    assert cut_numbers(videos / "P02_11.MP4", entry.part) == expected


def test_a_time_is_the_float_nearest_to_it() -> None:
    for minutes in (1, 61, 599):
        for n in range(0, 6000, 7):
            text = f"{n // 100:02d}.{n % 100:02d}"
            exact = 60 * minutes + Decimal(text)
            assert _seconds(f"{minutes // 60:02d}:{minutes % 60:02d}:{text}") == float(exact)


def test_the_label_is_the_verb_and_the_noun_is_a_fact(make_videos: MakeVideos) -> None:
    listing = read(make_videos("P02_11.mp4"), row())
    (entry,) = listing.entries
    assert entry.facts == {"verb_class": 1, "noun_class": 7, "narration": "put cup, then go"}
    assert entry.label_name == "1"
    assert listing.labels == tuple(str(number) for number in range(97))


def test_verb_and_noun_are_two_label_sets_with_the_names_of_their_files(
    make_videos: MakeVideos, tmp_path: Path
) -> None:
    videos = make_videos("P02_11.mp4")
    numbered = read(videos, row())
    assert numbered.label_sets is not None
    assert {name: len(names) for name, names in numbered.label_sets.items()} == {
        "verb": 97,
        "noun": 300,
    }
    assert numbered.entries[0].names_by_set == {"verb": "1", "noun": "7"}
    (tmp_path / "verbs.csv").write_text(VERBS, encoding="utf-8")
    (tmp_path / "nouns.csv").write_text("id,key\n0,tap\n1,spoon\n", encoding="utf-8")
    files = {"labels": tmp_path / "verbs.csv", "nouns": tmp_path / "nouns.csv"}
    named = read(videos, row(noun="1"), **files)
    assert named.label_sets == {"verb": ("take", "put"), "noun": ("tap", "spoon")}
    assert named.entries[0].names_by_set == {"verb": "put", "noun": "spoon"}
    with pytest.raises(UserError, match=r"line 2: noun_class '7' is not in 0\.\.1"):
        read(videos, row(), **files)


def classes(path: Path, count: int) -> Path:
    path.write_text("".join(["id,key\n", *(f"{n},name{n}\n" for n in range(count))]))
    return path


def test_files_of_names_that_were_taken_for_each_other_are_refused(
    make_videos: MakeVideos, tmp_path: Path
) -> None:
    videos = make_videos("P02_11.mp4")
    verbs, nouns = classes(tmp_path / "verbs.csv", 97), classes(tmp_path / "nouns.csv", 300)
    with pytest.raises(
        UserError, match=r"--labels .*nouns\.csv has 300.*--nouns the file of the nouns"
    ):
        read(videos, row(), labels=nouns)
    with pytest.raises(UserError, match=r"--nouns .*verbs\.csv has 97 classes.*number of verbs"):
        read(videos, row(), labels=verbs, nouns=verbs)
    assert read(videos, row(), labels=verbs, nouns=nouns).notes == ()


def test_classes_that_are_called_by_number_or_are_too_few_are_told(
    make_videos: MakeVideos, tmp_path: Path
) -> None:
    videos = make_videos("P02_11.mp4")
    few = classes(tmp_path / "few.csv", 9)
    assert read(videos, row()).notes == ()
    assert read(videos, row(), nouns=few).notes == (
        "the verbs have numbers as names: --labels names them",
        "9 nouns in few.csv; the published set has 300",
    )


@pytest.mark.parametrize(("lost", "kept"), [("noun", "verb"), ("verb", "noun")])
def test_a_list_with_one_of_the_two_classes_is_refused(
    make_videos: MakeVideos, lost: str, kept: str
) -> None:
    header = HEADER.replace(f"{lost}_class", "other")
    with pytest.raises(UserError, match=f"column '{kept}_class' and none '{lost}_class'"):
        read(make_videos("P02_11.mp4"), row(), header=header, skip_bad_rows=True)


def test_names_of_nouns_are_for_epic_kitchens_alone(
    make_videos: MakeVideos, tmp_path: Path
) -> None:
    source = Source(make_videos("a.mp4"), nouns=classes(tmp_path / "nouns.csv", 3))
    with pytest.raises(UserError, match="--dataset folder does not read --nouns"):
        read_listing("folder", source)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (row("x", start="1.5"), r"'1\.5' is not a time HH:MM:SS\.ss"),
        (row("x", start="00:00:04.00"), "the action stops before it starts"),
        (row("x", verb="97"), r"verb_class '97' is not in 0\.\.96"),
        (row("x", noun=""), r"noun_class '' is not in 0\.\.299"),
        (row("x", video=""), "narration_id or video_id is empty"),
    ],
)
def test_a_wrong_row_says_what_is_wrong(make_videos: MakeVideos, wrong: str, reason: str) -> None:
    with pytest.raises(UserError, match=rf"list\.csv has 1 bad row.*line 3: {reason}"):
        read(make_videos("P02_11.mp4"), row(), wrong)


def test_the_verbs_have_the_names_and_numbers_of_their_file(
    make_videos: MakeVideos, tmp_path: Path
) -> None:
    verbs = tmp_path / "verbs.csv"
    verbs.write_text(VERBS, encoding="utf-8")
    videos = make_videos("P02_11.mp4")
    listing = read(videos, row(), row("P02_11_1", verb="0"), labels=verbs)
    assert listing.labels == ("take", "put")
    assert [entry.label_name for entry in listing.entries] == ["put", "take"]
    with pytest.raises(UserError, match=r"list\.csv has 1 bad row.*line 2: verb_class '2'"):
        read(videos, row(verb="2"), labels=verbs)


@pytest.mark.parametrize(
    "text", ["id,key\n1,take\n0,put\n", "id,key\n1,take\n2,put\n", "id,key\n0,take\n0,put\n"]
)
def test_verbs_out_of_order_are_refused(make_videos: MakeVideos, tmp_path: Path, text: str) -> None:
    verbs = tmp_path / "verbs.csv"
    verbs.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"verbs\.csv: ids are not"):
        read(make_videos("P02_11.mp4"), row(), labels=verbs)


def test_the_test_times_have_no_labels(make_videos: MakeVideos) -> None:
    line = "P01_1_0,P01,P01_1,00:00:02.851,00:00:02.86,00:00:03.87,143,193"
    videos = make_videos("P01_1.MP4")
    listing = read(videos, line, header=TEST_HEADER)
    (entry,) = listing.entries
    assert (entry.video_id, entry.label_name, entry.part) == ("P01_1_0", None, (2.86, 3.87))
    assert (listing.labels, entry.facts, listing.notes) == (None, {}, ())
    named = classes(videos.parent / "verbs.csv", 97)
    listing = read(videos, line, header=TEST_HEADER, labels=named)
    assert (listing.label_sets, listing.notes) == (
        None,
        ("list.csv has no labels; --labels is ignored",),
    )


def test_many_actions_of_one_video_stand_in_the_order_of_their_ids(
    make_videos: MakeVideos,
) -> None:
    videos = make_videos("a/P02_11.MP4", "a/P03_02.MP4", "a/P04_01.MP4")
    rows = [row("P03_02_0", video="P03_02"), row("P02_11_1"), row("P02_11_0")]
    listing = read(videos, *rows)
    assert [(e.video_id, e.source_path) for e in listing.entries] == [
        ("P02_11_0", "a/P02_11.MP4"),
        ("P02_11_1", "a/P02_11.MP4"),
        ("P03_02_0", "a/P03_02.MP4"),
    ]
    assert read(videos, *reversed(rows)).entries == listing.entries


def test_actions_of_a_video_that_is_not_there_are_missing(make_videos: MakeVideos) -> None:
    listing = read(make_videos("P02_11.mp4"), row(), row("P03_02_0", video="P03_02"))
    assert [entry.video_id for entry in listing.entries] == ["P02_11_0"]
    (reject,) = listing.rejects
    assert (reject.source_path, reject.reason) == ("P03_02 for P03_02_0", "missing")
    assert "line 3" in reject.message


@pytest.mark.parametrize(
    "wrong",
    [
        row("x", start="1.5"),
        row("x", start=""),
        row("x", start="00:00:03.25"),
        row("x", start="00:00:04.00"),
        row("x", stop="00:03.25"),
        row("x", stop="-0:00:03.25"),
        row("x", stop="00:00:nan"),
        row("x", stop="00:60:04.00"),
        row("x", stop="00:00:60.00"),
        row("x", verb="97"),
        row("x", verb="-1"),
        row("x", verb=""),
        row("x", verb="put"),
        row("x", noun="300"),
        row("x", noun=""),
        row("x", video=""),
        row(""),
        row("x") + ",more",
        "x,P02,P02_11",
    ],
)
def test_a_wrong_row_is_named_or_counted(make_videos: MakeVideos, wrong: str) -> None:
    videos = make_videos("P02_11.mp4")
    with pytest.raises(UserError, match=r"list\.csv has 1 bad row.*line 3: "):
        read(videos, row(), wrong)
    listing = read(videos, row(), wrong, skip_bad_rows=True)
    assert [entry.video_id for entry in listing.entries] == ["P02_11_0"]
    assert [(r.source_path, r.reason) for r in listing.rejects] == [("list.csv", "bad_row")]


def test_two_files_of_one_video_are_a_bad_row(make_videos: MakeVideos) -> None:
    videos = make_videos("full/P02_11.MP4", "small/P02_11.mp4", "small/P03_02.mp4")
    rows = (row("P03_02_0", video="P03_02"), row())
    with pytest.raises(UserError, match=r"list\.csv has 1 bad row.*line 3: .*could be"):
        read(videos, *rows)
    listing = read(videos, *rows, skip_bad_rows=True)
    assert [entry.video_id for entry in listing.entries] == ["P03_02_0"]


def test_an_action_named_twice_is_a_bad_row_with_both_lines(make_videos: MakeVideos) -> None:
    videos = make_videos("P02_11.mp4")
    with pytest.raises(UserError, match=r"1 bad row.*line 3: 'P02_11_0' is already in line 2"):
        read(videos, row(), row())
    listing = read(videos, row(), row(), skip_bad_rows=True)
    assert [entry.video_id for entry in listing.entries] == ["P02_11_0"]
    assert [reject.reason for reject in listing.rejects] == ["bad_row"]


@pytest.mark.parametrize(
    ("name", "published"),
    [("EPIC_100_train.csv", "67,217"), ("EPIC_100_validation.csv", "9,668")],
)
def test_the_number_of_rows_is_compared_with_the_release(
    make_videos: MakeVideos, name: str, published: str
) -> None:
    listing = read(make_videos("P02_11.mp4"), row(), name=name)
    assert listing.notes == (f"1 rows in {name}; the published set has {published}",)


def test_a_file_without_the_needed_columns_is_refused(make_videos: MakeVideos) -> None:
    header = HEADER.replace("start_timestamp", "start")
    with pytest.raises(UserError, match="no column 'start_timestamp'"):
        read(make_videos("P02_11.mp4"), row(), header=header)
