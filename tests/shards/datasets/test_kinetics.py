"""Kinetics: CVDF's and the crawlers' file names, replacements, missing clips, numbers of labels."""

from __future__ import annotations

import csv
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from arvideo_ds.errors import UserError
from arvideo_ds.shards.datasets import Listing, Source, read_listing

MakeVideos = Callable[..., Path]
HEADER = "label,youtube_id,time_start,time_end,split"
# Two clips of one class and one of another; ids may begin with '-' and hold '_'.
DASH, UNDER, PLAIN = "-abcdefghi1", "_b-c_d-e_f2", "AbCdEfGhIj3"
ROWS = (f"zumba,{DASH},10,20,val", f"zumba,{UNDER},0,10,val", f"archery,{PLAIN},65,75,val")
FILES = (f"{DASH}_000010_000020.mp4", f"{UNDER}_000000_000010.mp4", f"{PLAIN}_000065_000075.mp4")


def write_csv(folder: Path, *rows: str, header: str = HEADER, name: str = "list.csv") -> Path:
    path = folder / name
    path.write_text("\n".join((header, *rows)) + "\n", encoding="utf-8")
    return path


def read(videos: Path, *rows: str, **options: object) -> Listing:
    path = write_csv(videos.parent, *rows)
    return read_listing("kinetics400", Source(videos, path, **options))


def found(listing: Listing) -> dict[str, tuple[str, str | None]]:
    return {e.video_id: (e.source_path, e.label_name) for e in listing.entries}


def genuine_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def name(row: dict[str, str]) -> str:
    start, end = int(row["time_start"]), int(row["time_end"])
    return f"{row['youtube_id']}_{start:06d}_{end:06d}"


def test_of_the_whole_genuine_csv_the_made_files_are_entries_and_all_else_is_missing(
    annotations: Path, make_videos: MakeVideos
) -> None:
    path = annotations / "kinetics" / "kinetics-400_val.csv"
    rows = genuine_rows(path)
    dash = next(row for row in rows if row["youtube_id"].startswith("-"))
    in_class, bare, replaced = rows[0], rows[7000], rows[-1]
    videos = make_videos(
        f"{name(dash)}.mp4",
        f"{in_class['label']}/{name(in_class)}.mp4",
        f"{bare['youtube_id']}.mp4",
        f"{name(replaced)}.mp4",
        "notes.txt",
        "unnamed_by_the_csv.mp4",
    )
    better = make_videos(f"{name(replaced)}.mp4", folder="replacement")
    listing = read_listing("kinetics400", Source(videos, path, "val", replacement=better))
    assert found(listing) == {
        name(dash): (f"{name(dash)}.mp4", dash["label"]),
        name(in_class): (f"{in_class['label']}/{name(in_class)}.mp4", in_class["label"]),
        name(bare): (f"{bare['youtube_id']}.mp4", bare["label"]),
        name(replaced): (f"{name(replaced)}.mp4", replaced["label"]),
    }
    taken = {entry.video_id: entry.path for entry in listing.entries}
    assert taken[name(replaced)] == better / f"{name(replaced)}.mp4"
    assert {reject.reason for reject in listing.rejects} == {"missing"}
    assert len(listing.entries) + len(listing.rejects) == len(rows) == 19_906
    lost = {reject.source_path for reject in listing.rejects}
    assert lost == {name(row) for row in rows} - set(taken)
    assert f"line {rows.index(rows[1]) + 2} " in listing.rejects[0].message  # rows[0] is there


def test_a_complete_genuine_release_has_all_classes_numbered_by_name_and_no_notes(
    annotations: Path, make_videos: MakeVideos, tmp_path: Path
) -> None:
    genuine = annotations / "kinetics" / "kinetics-400_val.csv"
    path = Path(shutil.copy(genuine, tmp_path / "val.csv"))
    rows = genuine_rows(path)
    videos = make_videos(*(f"{name(row)}.mp4" for row in rows))
    listing = read_listing("kinetics400", Source(videos, path))
    label_map = (annotations / "kinetics" / "label_map_k400.txt").read_text(encoding="utf-8")
    assert listing.labels == tuple(label_map.splitlines())
    assert (listing.rejects, listing.notes) == ((), ())
    assert {e.video_id: e.label_name for e in listing.entries} == {
        name(row): row["label"] for row in rows
    }


def test_a_genuine_test_csv_has_no_labels_and_its_count_is_compared(
    annotations: Path, make_videos: MakeVideos, tmp_path: Path
) -> None:
    genuine = annotations / "kinetics" / "kinetics-400_test.csv"
    path = Path(shutil.copy(genuine, tmp_path / "test.csv"))
    rows = genuine_rows(path)
    videos = make_videos(*(f"{name(row)}.mp4" for row in rows[:3]))
    assert rows[0]["youtube_id"].startswith("--")
    listing = read_listing("kinetics400", Source(videos, path, "test"))
    assert [e.video_id for e in listing.entries] == sorted(name(row) for row in rows[:3])
    assert {e.label_name for e in listing.entries} == {None}
    assert listing.labels is None
    assert len(listing.rejects) == len(rows) - 3
    # This copy has a row for each clip of the archive, the archive's own csv has more.
    assert listing.notes == ("38,685 rows in test.csv; the published set has 39,805",)


@pytest.mark.parametrize("classes", [400, 600, 700])
def test_genuine_label_maps_give_every_set_its_numbers(
    annotations: Path, make_videos: MakeVideos, classes: int
) -> None:
    label_map = annotations / "kinetics" / f"label_map_k{classes}.txt"
    file = "kinetics-400_val.csv" if classes == 400 else "kinetics-600_val.head.csv"
    path = annotations / "kinetics" / file
    rows = genuine_rows(path)
    known = label_map.read_text(encoding="utf-8").splitlines()
    row = next(row for row in reversed(rows) if row["label"] in known)
    videos = make_videos(f"{name(row)}.mp4")
    listing = read_listing(f"kinetics{classes}", Source(videos, path, labels=label_map))
    assert listing.labels == tuple(known)
    assert len(known) == classes
    assert listing.notes == ()
    assert len(listing.rejects) == len(rows) - 1


def test_files_lie_flat_or_in_class_folders_with_times_or_without(make_videos: MakeVideos) -> None:
    flat = make_videos(*FILES, folder="flat")
    assert {path for path, _ in found(read(flat, *ROWS)).values()} == set(FILES)
    nested = make_videos(f"zumba/{DASH}.mp4", f"zumba/{FILES[1]}", f"archery/{PLAIN}.webm")
    assert found(read(nested, *ROWS)) == {
        f"{DASH}_000010_000020": (f"zumba/{DASH}.mp4", "zumba"),
        f"{UNDER}_000000_000010": (f"zumba/{FILES[1]}", "zumba"),
        f"{PLAIN}_000065_000075": (f"archery/{PLAIN}.webm", "archery"),
    }


def test_a_file_with_other_times_is_not_the_clip(make_videos: MakeVideos) -> None:
    videos = make_videos(FILES[0], f"{PLAIN}_000005_000015.mp4")
    listing = read(videos, *ROWS)
    assert set(found(listing)) == {f"{DASH}_000010_000020"}
    assert [(r.source_path, r.reason) for r in listing.rejects] == [
        (f"{UNDER}_000000_000010", "missing"),
        (f"{PLAIN}_000065_000075", "missing"),
    ]


@pytest.mark.parametrize("stem", [f"{PLAIN}_000065_000075", PLAIN])
@pytest.mark.parametrize("better", [f"{PLAIN}_000065_000075", PLAIN])
def test_a_replacement_comes_first_whichever_name_it_has(
    make_videos: MakeVideos, stem: str, better: str
) -> None:
    videos = make_videos(f"archery/{stem}.mp4", FILES[0])
    replacement = make_videos(f"{better}.mp4", folder="replacement")
    listing = read(videos, *ROWS, replacement=replacement)
    assert {entry.video_id: entry.path for entry in listing.entries} == {
        f"{DASH}_000010_000020": videos / FILES[0],
        f"{PLAIN}_000065_000075": replacement / f"{better}.mp4",
    }


def test_a_replacement_folder_that_does_not_exist_is_refused(make_videos: MakeVideos) -> None:
    with pytest.raises(UserError, match=r"--replacement .*nowhere"):
        read(make_videos(*FILES), *ROWS, replacement=Path("nowhere"))


def test_of_two_files_of_one_name_that_in_the_folder_of_the_label_is_taken(
    make_videos: MakeVideos,
) -> None:
    videos = make_videos(f"archery/{FILES[2]}", f"zumba/{FILES[2]}", f"zumba/{FILES[0]}")
    assert found(read(videos, *ROWS))[FILES[2].removesuffix(".mp4")][0] == f"archery/{FILES[2]}"


def test_two_files_of_one_name_in_strange_folders_are_a_bad_row(make_videos: MakeVideos) -> None:
    videos = make_videos(f"one/{FILES[2]}", f"two/{FILES[2]}", *FILES[:2])
    with pytest.raises(UserError, match=r"list\.csv has 1 bad row.*line 4: .*could be"):
        read(videos, *ROWS)
    listing = read(videos, *ROWS, skip_bad_rows=True)
    assert Counter(reject.reason for reject in listing.rejects) == {"bad_row": 1}
    # A file that no row asks for does no harm.
    assert len(read(videos, *ROWS[:2]).entries) == 2


@pytest.mark.parametrize(
    "row",
    [
        "zumba,shortid,10,20,val",
        f"zumba,{DASH}x,10,20,val",
        f"zumba,{DASH},20,10,val",
        f"zumba,{DASH},10,10,val",
        f"zumba,{DASH},-1,10,val",
        f"zumba,{DASH},ten,20,val",
        f"zumba,{DASH},,20,val",
        f"zumba,{DASH},nan,20,val",
        f",{DASH},10,20,val",
        f"zumba,{DASH},10",
        f"zumba,{DASH},10,20,val,0",
        f"salsa, slow,{DASH},10,20,val",
    ],
)
def test_a_wrong_row_is_named_or_counted(make_videos: MakeVideos, row: str, tmp_path: Path) -> None:
    videos, names = make_videos(*FILES), tmp_path / "names.txt"
    names.write_text("zumba\narchery\n", encoding="utf-8")
    rows = (ROWS[1], row, ROWS[2])
    # With its line, even if its class is in no list.
    other = (ROWS[1], row.replace("zumba", "salsa"), ROWS[2])
    for given, labels in ((rows, None), (other, names)):
        with pytest.raises(UserError, match=r"list\.csv has 1 bad row.*line 3"):
            read(videos, *given, labels=labels)
    listing = read(videos, *rows, skip_bad_rows=True)
    assert [(r.source_path, r.reason) for r in listing.rejects] == [("list.csv", "bad_row")]
    assert "line 3" in listing.rejects[0].message
    assert len(listing.entries) == 2


def test_a_clip_named_twice_is_one_entry_and_one_duplicate(make_videos: MakeVideos) -> None:
    listing = read(make_videos(*FILES), *ROWS, ROWS[0])
    assert len(listing.entries) == 3
    assert [(r.source_path, r.reason) for r in listing.rejects] == [(FILES[0], "duplicate")]
    assert "line 5 names the file of line 2" in listing.rejects[0].message


def test_a_label_may_be_quoted_and_hold_a_comma(make_videos: MakeVideos) -> None:
    listing = read(make_videos(FILES[0]), f'"salsa, slow",{DASH},10,20,val')
    assert listing.labels == ("salsa, slow",)


def test_a_split_takes_its_rows_alone_and_validate_means_val(make_videos: MakeVideos) -> None:
    rows = (
        f"zumba,{DASH},10,20,train",
        f"zumba,{UNDER},0,10,validate",
        f"archery,{PLAIN},65,75,test",
    )
    for split, stem in {"train": DASH, "val": UNDER, "validate": UNDER, "test": PLAIN}.items():
        listing = read(make_videos(*FILES), *rows, split=split)
        assert [e.video_id[:11] for e in listing.entries] == [stem], split
        assert listing.rejects == ()


def test_numbers_of_labels_come_from_the_given_names_else_from_the_sorted_ones(
    make_videos: MakeVideos, tmp_path: Path
) -> None:
    videos = make_videos(*FILES)
    listing = read(videos, *ROWS)
    assert listing.labels == ("archery", "zumba")
    assert any("2 of 400 classes" in note for note in listing.notes)
    names = tmp_path / "names.txt"
    names.write_text("zumba\nbowling\narchery\n", encoding="utf-8")
    listing = read(videos, *ROWS, labels=names)
    assert listing.labels == ("zumba", "bowling", "archery")
    assert listing.notes == ("3 classes in names.txt; the published set has 400",)
    names.write_text("zumba\nbowling\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"names\.txt lacks the label 'archery'"):
        read(videos, *ROWS, labels=names)


def test_links_to_files_are_followed_and_those_to_nowhere_or_in_a_circle_are_no_files(
    make_videos: MakeVideos,
) -> None:
    videos = make_videos(FILES[0])
    outside = make_videos(FILES[1], f"inner/{FILES[2]}", folder="outside")
    (videos / FILES[1]).symlink_to(outside / FILES[1])
    (videos / "inner").symlink_to(outside / "inner")
    (videos / f"{PLAIN}_000065_000075.mkv").symlink_to(videos / "gone.mp4")
    (videos / f"{PLAIN}.mp4").symlink_to(videos / f"{PLAIN}.mp4")
    listing = read(videos, *ROWS)
    assert {entry.source_path for entry in listing.entries} == {FILES[0], FILES[1]}
    assert [reject.reason for reject in listing.rejects] == ["missing"]


def test_links_within_the_folder_and_a_folder_that_is_a_link_are_followed(
    make_videos: MakeVideos, tmp_path: Path
) -> None:
    videos = make_videos(f"all/{PLAIN}.mp4")
    (videos / "zumba").mkdir()
    (videos / "zumba" / FILES[0]).symlink_to(videos / "all" / f"{PLAIN}.mp4")
    (tmp_path / "link").symlink_to(videos)
    listing = read(tmp_path / "link", ROWS[0])
    assert [entry.source_path for entry in listing.entries] == [f"zumba/{FILES[0]}"]


def test_the_order_is_that_of_the_ids_whatever_the_rows_order(make_videos: MakeVideos) -> None:
    videos = make_videos(*FILES)
    first, second = read(videos, *ROWS), read(videos, *reversed(ROWS))
    assert first.entries == second.entries
    assert [e.video_id for e in first.entries] == sorted(e.video_id for e in first.entries)


def test_no_clip_at_all_and_a_missing_column_are_refused(make_videos: MakeVideos) -> None:
    with pytest.raises(UserError, match=r"no files for .*3 rows without a file"):
        read(make_videos(), *ROWS)
    path = write_csv(make_videos().parent, f"{DASH},10,20", header="id,time_start,time_end")
    with pytest.raises(UserError, match="no column 'youtube_id'"):
        read_listing("kinetics400", Source(make_videos(), path))
    with pytest.raises(UserError, match="--annotations is needed"):
        read_listing("kinetics400", Source(make_videos()))
