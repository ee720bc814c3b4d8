"""Readers: every video once, wrong rows named, nothing outside the folder, keys that never meet."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from arvideo_ds.errors import UserError
from arvideo_ds.shards.datasets import Entry, Source, read_listing, safe_key


def read_entries(dataset: str, source: Source) -> tuple[Entry, ...]:
    return read_listing(dataset, source).entries


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """A folder with a/1.mp4, a/2.webm and b/x/3.MP4; readers look at names, not into files."""
    folder = tmp_path / "videos"
    for name in ("a/1.mp4", "a/2.webm", "b/x/3.MP4", "b/notes.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def csv_source(videos: Path, text: str, split: str | None = None) -> Source:
    annotations = videos.parent / "list.csv"
    annotations.write_text(text, encoding="utf-8")
    return Source(videos, annotations, split)


def test_class_folders_are_the_labels_of_every_video_below_them(videos: Path) -> None:
    entries = read_entries("folder", Source(videos))
    found = [(entry.video_id, entry.source_path, entry.label_name) for entry in entries]
    assert found == [
        ("a/1", "a/1.mp4", "a"),
        ("a/2", "a/2.webm", "a"),
        ("b/x/3", "b/x/3.MP4", "b"),
    ]
    assert read_listing("folder", Source(videos)).labels == ("a", "b")


def test_videos_directly_in_the_folder_have_no_label(videos: Path) -> None:
    entries = read_entries("folder", Source(videos / "a"))
    assert [entry.video_id for entry in entries] == ["1", "2"]
    assert read_listing("folder", Source(videos / "a")).labels is None


def test_loose_videos_beside_class_folders_are_refused_by_name(videos: Path) -> None:
    (videos / "loose.mp4").write_bytes(b"x")
    with pytest.raises(UserError, match=r"loose\.mp4"):
        read_entries("folder", Source(videos))


def test_a_folder_split_is_a_subfolder_with_its_own_classes(videos: Path) -> None:
    entries = read_entries("folder", Source(videos, split="b"))
    assert [(entry.video_id, entry.label_name) for entry in entries] == [("b/x/3", "x")]
    with pytest.raises(UserError, match="--split c"):
        read_entries("folder", Source(videos, split="c"))


def test_a_folder_without_videos_and_a_missing_folder_are_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match=str(folder)):
            read_entries("folder", Source(folder))


def test_two_files_that_differ_in_suffix_alone_are_refused(videos: Path) -> None:
    (videos / "a" / "1.mkv").write_bytes(b"x")
    with pytest.raises(UserError, match=r"(?=.*a/1\.mkv)(?=.*a/1\.mp4)"):
        read_entries("folder", Source(videos))


def test_a_csv_gives_the_rows_of_the_asked_split(videos: Path) -> None:
    text = "path,label,split,note\na/1.mp4,run,train,\na/2.webm,jump,test,n\n"
    everything = read_entries("csv", csv_source(videos, text))
    assert [(e.source_path, e.label_name) for e in everything] == [
        ("a/1.mp4", "run"),
        ("a/2.webm", "jump"),
    ]
    test = read_entries("csv", csv_source(videos, text, split="test"))
    assert [entry.label_name for entry in test] == ["jump"]
    with pytest.raises(
        UserError, match=r"no row .* 'val'; .* 'train' \(1 rows\), 'test' \(1 rows\)"
    ):
        read_entries("csv", csv_source(videos, text, split="val"))


def test_a_csv_without_labels_gives_none(videos: Path) -> None:
    entries = read_entries("csv", csv_source(videos, "path\na/1.mp4\n"))
    assert [entry.label_name for entry in entries] == [None]


@pytest.mark.parametrize(
    "row",
    [",run", "a/2.webm,", "a/2.webm", "a/2.webm,run,more", "a,run", "a/1.mp4,run"],
)
def test_a_bad_row_is_named_with_file_and_line(videos: Path, row: str) -> None:
    source = csv_source(videos, f"path,label\na/1.mp4,run\n{row}\nb/x/3.MP4,run\n")
    with pytest.raises(UserError, match=r"list\.csv has 1 bad row.*line 3"):
        read_entries("csv", source)


def test_every_bad_row_is_counted(videos: Path) -> None:
    source = csv_source(videos, "path\n" + "../1.mp4\n" * 7)
    with pytest.raises(UserError, match=r"7 bad row.*line 2.*2 more"):
        read_entries("csv", source)


def test_a_row_cut_before_its_split_is_not_dropped_unsaid(videos: Path) -> None:
    source = csv_source(videos, "path,split\na/1.mp4,train\na/2.webm\n", split="train")
    with pytest.raises(UserError, match="line 3"):
        read_entries("csv", source)


def test_paths_and_links_that_lead_out_of_the_folder_are_refused(videos: Path) -> None:
    outside = videos.parent / "outside.mp4"
    outside.write_bytes(b"x")
    (videos / "link.mp4").symlink_to(outside)
    for path in ("../outside.mp4", str(outside), "link.mp4", "a/../../outside.mp4"):
        with pytest.raises(UserError, match=r"line 2: .*leads out"):
            read_entries("csv", csv_source(videos, f"path\n{path}\n"))


@pytest.mark.parametrize("again", ["a/1.mp4", "./a/1.mp4", "a/../a/1.mp4"])
def test_a_video_named_twice_is_a_bad_row_with_both_lines(videos: Path, again: str) -> None:
    with pytest.raises(UserError, match=r"line 3: 'a/1' is already in line 2"):
        read_entries("csv", csv_source(videos, f"path\na/1.mp4\n{again}\n"))


def test_a_file_that_is_not_there_is_missing_and_its_label_keeps_its_number(videos: Path) -> None:
    text = "path,label\na/1.mp4,run\na/gone.mp4,jump\nb/x/3.MP4,walk\n"
    listing = read_listing("csv", csv_source(videos, text))
    assert [entry.video_id for entry in listing.entries] == ["a/1", "b/x/3"]
    assert [(r.source_path, r.reason) for r in listing.rejects] == [("a/gone.mp4", "missing")]
    assert "line 3" in listing.rejects[0].message
    assert listing.labels == ("jump", "run", "walk")
    with pytest.raises(UserError, match=r"1 rows without a file there, such as gone\.mp4"):
        read_listing("csv", csv_source(videos, "path\ngone.mp4\n"))


@pytest.mark.parametrize("dataset", ["folder", "csv", "jsonl"])
def test_a_file_of_labels_sets_their_numbers(videos: Path, dataset: str) -> None:
    names, lists = videos.parent / "classes.txt", {}
    lists["csv"], lists["jsonl"] = videos.parent / "list.csv", videos.parent / "list.jsonl"
    lists["csv"].write_text("path,label\na/1.mp4,a\nb/x/3.MP4,b\n")
    lists["jsonl"].write_text(
        '{"path": "a/1.mp4", "label": "a"}\n{"path": "a/2.webm", "label": "b"}'
    )
    source = Source(videos, lists.get(dataset), labels=names)
    names.write_text("z\nb\na\n")
    assert read_listing(dataset, source).labels == ("z", "b", "a")
    for text, message in (("z\nb\n", "lacks the label 'a'"), ("a\nb\na\n", "'a' twice")):
        names.write_text(text)
        with pytest.raises(UserError, match=rf"classes\.txt .*{message}"):
            read_listing(dataset, source)


def test_a_file_of_labels_for_videos_without_any_is_refused(videos: Path) -> None:
    (videos.parent / "classes.txt").write_text("a\n")
    with pytest.raises(UserError, match=r"classes\.txt is given, but the videos have no labels"):
        read_listing("folder", Source(videos / "a", labels=videos.parent / "classes.txt"))


@pytest.mark.parametrize(
    ("dataset", "option", "value"),
    [
        ("hmdb51", "labels", Path("classes.txt")),
        ("ava", "labels", Path("classes.txt")),
        ("csv", "replacement", Path("better")),
        ("folder", "excluded", Path("excluded.csv")),
        ("csv", "window_s", 5.0),
    ],
)
def test_an_option_that_the_data_set_does_not_read_is_refused(
    videos: Path, dataset: str, option: str, value: object
) -> None:
    with pytest.raises(UserError, match=f"--dataset {dataset} does not read --{option}"):
        read_listing(dataset, Source(videos, **{option: value}))  # type: ignore[arg-type]


def test_a_csv_without_the_needed_column_is_refused(videos: Path) -> None:
    with pytest.raises(UserError, match="no column 'path'"):
        read_entries("csv", csv_source(videos, "file\na/1.mp4\n"))


@pytest.mark.parametrize(("separator", "name"), [(";", "';'"), ("\t", "a tab"), ("|", "'|'")])
@pytest.mark.parametrize("header", ["path,label", "label,path", "path,note 1,2"])
def test_another_separator_than_the_comma_is_named_with_file_and_line(
    videos: Path, separator: str, name: str, header: str
) -> None:
    text = f"{header}\na/1.mp4,run,1\n".replace(",", separator)
    with pytest.raises(UserError) as error:
        read_entries("csv", csv_source(videos, text))
    assert re.search(rf"list\.csv line 1: .*must be a comma.*{re.escape(name)}", str(error.value))


def test_a_table_without_rows_is_named(videos: Path) -> None:
    with pytest.raises(UserError, match=r"--annotations .*list\.csv lists no videos\."):
        read_entries("csv", csv_source(videos, "path,label,label_id\n"))


def test_a_file_that_was_passed_over_is_counted_by_its_suffix(videos: Path) -> None:
    for name in ("x.gif", "y.GIF", "z.h264", "archive.tar.gz", "no_suffix"):
        (videos / "a" / name).write_bytes(b"x")
    # What belongs to a data set beside its videos, and what a system leaves behind.
    for name in (".DS_Store", "Thumbs.db", "labels.csv", "README.md", "1.json", "._hidden.gif"):
        (videos / "a" / name).write_bytes(b"x")
    (videos / ".cache").mkdir()
    (videos / ".cache" / "picture.png").write_bytes(b"x")
    listing = read_listing("folder", Source(videos))
    assert listing.passed_over == {".gif": 2, ".h264": 1, ".gz": 1, "no suffix": 1}
    assert read_listing("folder", Source(videos / "b")).passed_over == {}
    with pytest.raises(UserError, match=r"no files for .*\.png 1"):
        (videos.parent / "other").mkdir()
        (videos.parent / "other" / "1.png").write_bytes(b"x")
        read_listing("folder", Source(videos.parent / "other"))


def test_a_csv_may_name_videos_of_any_suffix(videos: Path) -> None:
    (videos / "moving.gif").write_bytes(b"x")
    (entry,) = read_entries("csv", csv_source(videos, "path\nmoving.gif\n"))
    assert entry.path == videos / "moving.gif"


IDS = st.one_of(
    st.text(alphabet="a_/-.", min_size=1, max_size=5),
    st.text(min_size=1, max_size=120),
)


@given(st.sets(IDS, min_size=2, max_size=30))
@example({"a_/b", "a/_b"})
@example({"-", "--"})
@example({"a" * 90 + "1", "a" * 90 + "2"})
def test_keys_are_safe_file_names_and_never_meet(video_ids: set[str]) -> None:
    keys = [safe_key(video_id) for video_id in video_ids]
    assert len(set(keys)) == len(video_ids)
    for key in keys:
        assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", key)
        assert len(key) <= 99  # with a suffix still within ustar's 100 bytes


def test_plain_ids_stay_readable() -> None:
    assert safe_key("run/abc-123_x") == "run__abc-123_x"


def test_spaces_after_the_commas_of_a_csv_lose_no_label(videos: Path) -> None:
    paths = [p.relative_to(videos).as_posix() for p in sorted(videos.rglob("*.mp4"))][:2]
    table = videos.parent / "spaced.csv"
    table.write_text("path, label\n" + "".join(f"{path}, class {path[0]}\n" for path in paths))
    listing = read_listing("csv", Source(videos, table))
    assert {entry.label_name for entry in listing.entries} == {f"class {p[0]}" for p in paths}


def test_attribute_files_of_macos_are_no_videos(videos: Path) -> None:
    before = len(read_listing("folder", Source(videos)).entries)
    first = next(videos.rglob("*.mp4"))
    (first.parent / f"._{first.name}").write_bytes(b"attributes")
    assert len(read_listing("folder", Source(videos)).entries) == before
