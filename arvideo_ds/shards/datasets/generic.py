"""Anyone's own videos: a folder tree, a CSV, or JSON lines; with labels or without."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
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
    csv_rows,
    file_entry,
    missing,
    number_labels,
    text_lines,
)
from arvideo_ds.shards.manifest import Reject
from arvideo_ds.shards.video_files import find_videos

_KEEP_COLUMNS = Option(
    "keep_columns",
    "store these with the samples, such as the actor, for reshard --group_by",
    str,
    (),
    several=True,
)
# Names of facts that make_shards writes itself (members.Facts).
_TAKEN = frozenset(
    """video_id source_path label label_name labels_by_set names_by_set part num_frames fps width
    height duration_s length_s codec decoder_errors bytes sha256""".split()
)


def read_folder(source: Source) -> Listing:
    """A tree of videos. Class folders are labels; videos directly in the folder have none.

    With `--split S`, a subfolder of that name is the root.
    """
    if source.annotations is not None:
        raise UserError(
            "--dataset folder takes its labels from the folders; use --dataset csv with "
            "--annotations."
        )
    root = source.videos
    if source.split is not None:
        root = source.videos / source.split
        if not root.is_dir():
            raise UserError(f"--split {source.split}: there is no folder {root}.")
    passed_over = Counter[str]()
    paths = [path for path in find_videos(root, passed_over) if path.is_file()]
    labels = [p.relative_to(root).parts[0] if p.parent != root else None for p in paths]
    if len({label is None for label in labels}) > 1:
        loose = next(p for p, label in zip(paths, labels, strict=True) if label is None)
        raise UserError(
            f"{root} mixes class folders with loose videos such as {loose.name}: move the loose "
            "ones into class folders, or use --dataset csv."
        )
    entries = [
        file_entry(source.videos, path, label) for path, label in zip(paths, labels, strict=True)
    ]
    return Listing(tuple(entries), number_labels(source, entries), passed_over=passed_over)


def read_csv(source: Source) -> Listing:
    """A CSV with a header: `path` (below --videos); optional `label`, `split`, `start_s`, `stop_s`.

    Other columns are ignored. `--split S` keeps the rows whose `split` is S.
    """
    path = source.need_annotations("a CSV with a header: path,label,...")
    bad_rows = BadRows(path, skip=source.skip_bad_rows)
    needed = ["path", *source.get(_KEEP_COLUMNS)] + ["split"] * (source.split is not None)
    return _listing(source, _of_split(source, csv_rows(path, needed, bad_rows)), bad_rows)


def read_jsonl(source: Source) -> Listing:
    """JSON lines, one object a video, with the keys of the CSV's columns."""
    path = source.need_annotations('one JSON object a line: {"path": ..., "label": ...}')
    bad_rows = BadRows(path, skip=source.skip_bad_rows)
    rows = []
    for line, text in text_lines(path):
        try:
            row = json.loads(text)
        except ValueError as error:
            bad_rows.add(line, f"no JSON ({error})")
            continue
        if not isinstance(row, dict) or not isinstance(row.get("path"), str):
            bad_rows.add(line, "no object with a 'path'")
        elif source.split is not None and "split" not in row:
            bad_rows.add(line, "no 'split'")
        else:
            rows.append((line, row))
    rows = list(_of_split(source, rows))
    if any(row.get("label") is not None for _, row in rows):
        for line, row in rows:
            if row.get("label") is None:
                bad_rows.add(line, "no label, but other rows have one")
        rows = [(line, row) for line, row in rows if row.get("label") is not None]
    return _listing(source, rows, bad_rows)


def _of_split(
    source: Source, rows: Iterable[tuple[int, dict[str, Any]]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of `--split`. Errors: `UserError` where there are rows, but none of that value."""
    seen: Counter[str] = Counter()
    for line, row in rows:
        seen[str(row.get("split"))] += 1
        if source.split is None or row["split"] == source.split:
            yield line, row
    if source.split is not None and seen and source.split not in seen:
        values = ", ".join(f"'{value}' ({count:,} rows)" for value, count in seen.most_common(8))
        raise UserError(
            f"no row of {source.annotations} has the split '{source.split}'; the column holds "
            f"{values}."
        )


def _listing(
    source: Source, rows: Iterable[tuple[int, dict[str, Any]]], bad_rows: BadRows
) -> Listing:
    _require_free_names(source.get(_KEEP_COLUMNS))
    entries: list[Entry] = []
    absent: list[Entry] = []
    rejects: list[Reject] = []
    for line, row in rows:
        try:
            facts = _kept_columns(row, source.get(_KEEP_COLUMNS))
            entry = replace(_row_entry(source.videos, row), facts=facts)
            bad_rows.require_new(line, entry.video_id)
        except ValueError as error:
            bad_rows.add(line, error)
            continue
        if entry.path.exists():
            entries.append(entry)
        else:
            absent.append(entry)
            rejects.append(missing(entry.source_path, line))
    rejects += bad_rows.finish()
    # Labels of all rows: which files are there must not change the numbers.
    labels = number_labels(source, [*entries, *absent])
    return Listing(tuple(entries), labels, tuple(rejects))


def _require_free_names(columns: Iterable[str]) -> None:
    for name in columns:
        if name in _TAKEN:
            raise UserError(
                f"--keep_columns: '{name}' is a fact of every sample already; give the column "
                "another name."
            )


def _kept_columns(row: dict[str, Any], columns: Iterable[str]) -> dict[str, Any]:
    """Errors: `ValueError` where the row lacks one."""
    for name in columns:
        if name not in row:
            raise ValueError(f"no '{name}'")
    return {name: row[name] for name in columns}


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
            raise ValueError(f"path {row['path']} is no file")
    except (OSError, RuntimeError) as error:  # such as a name too long, a circle of links
        raise ValueError(f"path {row['path']} cannot be read ({error})") from None
    label = None if label is None else str(label)
    part = _part(row)
    if part is None:
        return file_entry(videos, path, label)
    stem = path.relative_to(videos).with_suffix("").as_posix()
    video_id = f"{stem}_{part[0]:.3f}_{part[1]:.3f}"
    return file_entry(videos, path, label, video_id=video_id, part=part)


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
CSV = Reader(read_csv, (LABELS, _KEEP_COLUMNS), split="a value of the column")
JSONL = Reader(read_jsonl, (LABELS, _KEEP_COLUMNS), split="a value of the key")
