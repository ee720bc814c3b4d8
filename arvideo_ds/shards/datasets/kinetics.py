"""Kinetics-400/600/700: the CSV of the release, files as CVDF or crawlers name them.

Files are `<youtube id>_<start>_<end>.mp4` (six digits each) or `<youtube id>.mp4`, flat or in class
folders. Ids are the first eleven characters, which include '-' and '_'. Missing clips are normal
and become rejects.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from arvideo_ds.errors import UserError
from arvideo_ds.shards.datasets.listing import (
    LABELS,
    ClipRows,
    Entry,
    Listing,
    Option,
    Reader,
    Source,
    VideoTree,
    class_names,
    csv_rows,
    missing,
)
from arvideo_ds.shards.manifest import Reject

_ID = 11
_REPLACEMENT = Option("replacement", "folder of better copies")
# Rows of the CSV files of CVDF's Kinetics-400.
_ROWS = {(400, "train"): 246_534, (400, "val"): 19_906, (400, "test"): 39_805}
# Names of a split in the rows of the releases.
_SPLIT_NAMES = {"val": ("val", "validate")}


def _read(num_classes: int, source: Source) -> Listing:
    path = source.need_annotations(
        "the release's train.csv, val.csv or test.csv (label,youtube_id,time_start,time_end)"
    )
    rows = ClipRows(source, path)
    clips = _Clips(rows.tree, source.get(_REPLACEMENT))
    count = 0
    names: set[str | None] = set()
    splits = _SPLIT_NAMES.get(source.split or "", (source.split,))
    used: dict[Path, int] = {}
    for line, row in csv_rows(path, ["youtube_id", "time_start", "time_end"], rows):
        if source.split and row.get("split", source.split) not in splits:
            continue
        count += 1
        names.add(row.get("label"))
        with rows.at(line):
            entry = clips.entry(row, line)
            if isinstance(entry, Reject):
                rows.rejects.append(entry)
            elif (first := used.setdefault(entry.path, line)) != line:
                message = f"line {line} names the file of line {first} again"
                rows.rejects.append(
                    Reject(source_path=entry.source_path, reason="duplicate", message=message)
                )
            else:
                rows.entries.append(entry)
    rows.finish()  # a class of a wrong row would be an error without its line
    labels = _labels(rows, source.get(LABELS), names - {""}, num_classes)
    rows.compare(f"rows in {path.name}", count, _ROWS.get((num_classes, path.stem)))
    return rows.listing(labels)


class _Clips:
    """Files by youtube id and start second; files of `replacement` have priority."""

    def __init__(self, videos: VideoTree, replacement: Path | None) -> None:
        self._videos, trees = videos.root, [videos]
        if replacement is not None:
            if not replacement.is_dir():
                raise UserError(f"--replacement {replacement} is not a folder.")
            trees.insert(0, VideoTree(replacement))
            videos.passed_over = trees[0].passed_over + videos.passed_over
        self._trees: list[tuple[VideoTree, dict[tuple[str, int | None], str]]] = []
        for tree in trees:
            # Sorted: the choice between two files of one clip must not depend on the disk.
            stems = {_file_key(stem): stem for stem in sorted(tree.stems())}
            self._trees.append((tree, {key: stem for key, stem in stems.items() if key}))

    def entry(self, row: dict[str, str], line: int) -> Entry | Reject:
        """The entry of a row, or a reject without a file. Errors: `ValueError` for a bad row."""
        youtube_id, start, end = row["youtube_id"], row["time_start"], row["time_end"]
        if len(youtube_id) != _ID:
            raise ValueError(f"youtube_id '{youtube_id}' has not {_ID} characters")
        are_seconds = all(re.fullmatch(r"\d+(\.\d+)?", text) for text in (start, end))
        if not (are_seconds and float(start) < float(end)):
            raise ValueError(
                f"time_start '{start}' and time_end '{end}' are not seconds in increasing order"
            )
        label = row.get("label")
        if label == "":
            raise ValueError("label is empty")
        start_s, end_s = int(float(start)), int(float(end))
        name = f"{youtube_id}_{start_s:06d}_{end_s:06d}"
        keys = ((youtube_id, start_s), (youtube_id, None))
        files = ((tree, stems[key]) for tree, stems in self._trees for key in keys if key in stems)
        path = next((tree.find(stem, folder=label or "") for tree, stem in files), None)
        if path is None:
            return missing(name, line)
        inside = path.is_relative_to(self._videos)
        source_path = path.relative_to(self._videos).as_posix() if inside else path.name
        return Entry(name, path, source_path, label)


def _file_key(stem: str) -> tuple[str, int | None] | None:
    match = re.fullmatch(r"(.{11})(?:_(\d{6})_\d{6})?", stem)
    if match is None:
        return None
    return match[1], int(match[2]) if match[2] else None


def _labels(
    rows: ClipRows, path: Path | None, in_rows: set[str | None], num_classes: int
) -> tuple[str, ...] | None:
    """Class names in order, from --labels or, sorted, from the rows."""
    if None in in_rows:
        return None
    names = tuple(sorted(str(name) for name in in_rows))
    if path is not None:
        names = class_names(path, names)
        rows.compare(f"classes in {path.name}", len(names), num_classes)
    elif len(names) != num_classes:
        rows.notes.append(
            f"the rows have {len(names)} of {num_classes} classes, numbered here by their sorted "
            "names; give --labels FILE, one name per line, where other splits must agree"
        )
    return names


def _reader(num_classes: int) -> Reader:
    return Reader(
        partial(_read, num_classes),
        (LABELS, _REPLACEMENT),
        split="a value of the column",
        url="https://github.com/cvdfoundation/kinetics-dataset",
    )


KINETICS400, KINETICS600, KINETICS700 = map(_reader, (400, 600, 700))
