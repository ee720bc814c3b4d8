"""Your own videos: a folder tree, a CSV, or JSON lines; with labels or without."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from arvideo_ds.errors import UserError
from arvideo_ds.shards.datasets.listing import (
    LABELS,
    BadRows,
    Entry,
    Listing,
    Option,
    Reader,
    Source,
    class_names,
    csv_rows,
    file_entry,
    missing,
    text_lines,
)
from arvideo_ds.shards.manifest import Reject
from arvideo_ds.shards.members import Facts
from arvideo_ds.shards.video_files import IMAGE_SUFFIXES, VIDEO_SUFFIXES, find_videos

_KEEP_COLUMNS = Option(
    "keep_columns",
    "columns to store with the samples, such as actor, for reshard --group_by",
    str,
    (),
    several=True,
)
# Names of the facts that make_shards writes.
_TAKEN = {*Facts.model_fields, "part", "length_s"}


def read_folder(source: Source, suffixes: frozenset[str] = VIDEO_SUFFIXES) -> Listing:
    """A tree of videos, or of files with other suffixes; class folders are labels. With `--split
    S`, the subfolder S is the root."""
    if source.annotations is not None:
        raise UserError(
            "this data set takes its labels from the folders; use --dataset csv with --annotations."
        )
    root = source.videos
    if source.split is not None:
        root = source.videos / source.split
        if not root.is_dir():
            raise UserError(f"--split {source.split}: the folder {root} does not exist.")
    passed_over = Counter[str]()
    paths = [path for path in find_videos(root, passed_over, suffixes) if path.is_file()]
    labels = [p.relative_to(root).parts[0] if p.parent != root else None for p in paths]
    if len({label is None for label in labels}) > 1:
        loose = next(p for p, label in zip(paths, labels, strict=True) if label is None)
        raise UserError(
            f"{root} mixes class folders with loose files such as {loose.name}: move the loose "
            "ones into class folders, or use --dataset csv."
        )
    entries = tuple(map(partial(file_entry, source.videos), paths, labels))
    return Listing(entries, _number_labels(source, entries), passed_over=passed_over)


def _number_labels(source: Source, entries: Sequence[Entry]) -> tuple[str, ...] | None:
    """Class names in the order of their numbers: from --labels, else sorted; None without labels.

    Errors: `UserError` where --labels does not match the entries.
    """
    names = {entry.label_name for entry in entries}
    path = source.get(LABELS)
    if path is None:
        return tuple(sorted(str(name) for name in names)) if None not in names else None
    if None in names:
        raise UserError(
            f"--labels {path} is given, but the videos have no labels: those come from "
            "class folders, or from `label` in the rows."
        )
    return class_names(path, (str(name) for name in names))


def read_csv(source: Source) -> Listing:
    """A CSV with a header: `path` (below --videos); optional `label`, `split`, `start_s`, `stop_s`.

    Other columns are ignored. `--split S` keeps the rows whose `split` is S.
    """
    path = source.need_annotations("a CSV with a header: path,label,...")
    bad_rows = BadRows(path, skip=source.skip_bad_rows)
    needed = ["path", *source.get(_KEEP_COLUMNS)] + ["split"] * (source.split is not None)
    return _listing(source, _of_split(source, csv_rows(path, needed, bad_rows)), bad_rows)


def read_jsonl(source: Source) -> Listing:
    """JSON lines, one object per video, with the keys of the CSV's columns."""
    path = source.need_annotations('one JSON object per line: {"path": ..., "label": ...}')
    bad_rows = BadRows(path, skip=source.skip_bad_rows)
    rows = []
    for line, text in text_lines(path):
        with bad_rows.at(line):
            rows.append((line, _json_row(text, needs_split=source.split is not None)))
    rows = list(_of_split(source, rows))
    unlabelled = [line for line, row in rows if row.get("label") is None]
    if len(unlabelled) < len(rows):
        for line in unlabelled:
            bad_rows.add(line, "no label, but other rows have one")
        rows = [(line, row) for line, row in rows if row.get("label") is not None]
    return _listing(source, rows, bad_rows)


def _json_row(text: str, *, needs_split: bool) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except ValueError as error:
        raise ValueError(f"no JSON ({error})") from None
    if not isinstance(row, dict) or not isinstance(row.get("path"), str):
        raise ValueError("no object with a 'path'")
    if needs_split and "split" not in row:
        raise ValueError("no 'split'")
    return row


def _of_split(
    source: Source, rows: Iterable[tuple[int, dict[str, Any]]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of `--split`. Errors: `UserError` where rows exist, but none of that split."""
    seen: Counter[str] = Counter()
    for line, row in rows:
        seen[str(row.get("split"))] += 1
        if source.split is None or row["split"] == source.split:
            yield line, row
    if source.split is not None and seen and source.split not in seen:
        values = ", ".join(f"'{value}' ({count:,} rows)" for value, count in seen.most_common(8))
        raise UserError(
            f"no row of {source.annotations} has the split '{source.split}'; the column has "
            f"{values}."
        )


def _listing(
    source: Source, rows: Iterable[tuple[int, dict[str, Any]]], bad_rows: BadRows
) -> Listing:
    columns = source.get(_KEEP_COLUMNS)
    if taken := [name for name in columns if name in _TAKEN]:
        raise UserError(
            f"--keep_columns: '{taken[0]}' is a fact of every sample already; give the column "
            "another name."
        )
    entries: list[Entry] = []
    absent: list[Entry] = []
    rejects: list[Reject] = []
    for line, row in rows:
        with bad_rows.at(line):
            if lacking := [name for name in columns if name not in row]:
                raise ValueError(f"no '{lacking[0]}'")
            facts = {name: row[name] for name in columns}
            entry = replace(_row_entry(source.videos, row), facts=facts)
            bad_rows.require_new(line, entry.video_id)
            if entry.path.exists():
                entries.append(entry)
            else:
                absent.append(entry)
                rejects.append(missing(entry.source_path, line))
    rejects += bad_rows.finish()
    # Labels of all rows: missing files must not change the numbers.
    labels = _number_labels(source, [*entries, *absent])
    return Listing(tuple(entries), labels, tuple(rejects))


def _row_entry(videos: Path, row: dict[str, Any]) -> Entry:
    if not row["path"]:
        raise ValueError("path is empty")
    label = row.get("label")
    if label == "":
        raise ValueError(f"label is empty for {row['path']}")
    if not (label is None or isinstance(label, (str, int))):
        raise ValueError(f"label {label} is neither a name nor a number")
    path = videos / os.path.normpath(row["path"])
    try:
        if not path.resolve().is_relative_to(videos.resolve()):
            raise ValueError(f"path {row['path']} leads out of --videos {videos}")
        if path.exists() and not path.is_file():
            raise ValueError(f"path {row['path']} is not a file")
    except (OSError, RuntimeError) as error:  # such as a name too long, a circle of links
        raise ValueError(f"path {row['path']} cannot be read ({error})") from None
    entry = file_entry(videos, path, None if label is None else str(label), part=_part(row))
    if entry.part is None:
        return entry
    start, stop = entry.part
    return replace(entry, video_id=f"{entry.video_id}_{start:.3f}_{stop:.3f}")


def _part(row: dict[str, Any]) -> tuple[float, float] | None:
    given = [row.get("start_s"), row.get("stop_s")]
    if all(value in (None, "") for value in given):
        return None
    try:
        start, stop = (float(value) for value in given)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"start_s and stop_s must both be seconds, not {given}") from None
    if not 0 <= start < stop < float("inf"):
        raise ValueError(f"start_s {start:g} must be before stop_s {stop:g}")
    return start, stop


FOLDER = Reader(read_folder, (LABELS,), split="a subfolder")
IMAGES = Reader(
    partial(read_folder, suffixes=IMAGE_SUFFIXES),
    (LABELS,),
    split="a subfolder",
    stride=1,
    suffixes=IMAGE_SUFFIXES,
)
CSV = Reader(read_csv, (LABELS, _KEEP_COLUMNS), split="a value of the column")
JSONL = Reader(read_jsonl, (LABELS, _KEEP_COLUMNS), split="a value of the key")
