"""From what people have on disk to a list of entries: which video, which label.

Readers check every row before any work begins; a wrong row is named with file and line.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from arvideo_ds.errors import UserError

VIDEO_SUFFIXES = frozenset(
    ".mp4 .webm .avi .mkv .mov .m4v .mpg .mpeg .ts .flv .wmv .3gp .ogv .m2ts".split()
)
_SHOWN_ERRORS = 5
_LONGEST_KEY = 80


@dataclass(frozen=True)
class Entry:
    """One video to ingest. `video_id` is its path below the videos folder, without suffix."""

    video_id: str
    path: Path
    source_path: str
    label_name: str | None


@dataclass(frozen=True)
class Source:
    """Where the user says the data set lies."""

    videos: Path
    annotations: Path | None = None
    split: str | None = None


def read_entries(dataset: str, source: Source) -> list[Entry]:
    """Entries of a data set in a fixed order (by video id).

    Errors: `UserError` for missing folders, malformed rows, paths outside the videos folder,
    videos named twice, or no video at all.
    """
    if not source.videos.is_dir():
        raise UserError(f"--videos {source.videos} is no folder.")
    entries = sorted(READERS[dataset](source), key=lambda entry: entry.video_id)
    if not entries:
        raise UserError(
            f"no videos found for --dataset {dataset} below {source.videos}"
            + (f", split '{source.split}'" if source.split else "")
            + f"; files are known by their suffix: {' '.join(sorted(VIDEO_SUFFIXES))}."
        )
    for first, second in itertools.pairwise(entries):
        if first.video_id == second.video_id:
            raise UserError(
                f"two entries share the video id '{first.video_id}': {first.source_path} and "
                f"{second.source_path}. Ids are paths without suffix and must be unique."
            )
    return entries


def read_folder(source: Source) -> list[Entry]:
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
    paths = [p for p in root.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES and p.is_file()]
    labels = [p.relative_to(root).parts[0] if p.parent != root else None for p in paths]
    if len({label is None for label in labels}) > 1:
        loose = next(p for p, label in zip(paths, labels, strict=True) if label is None)
        raise UserError(
            f"{root} mixes class folders with loose videos such as {loose.name}: move the loose "
            "ones into class folders, or use --dataset csv."
        )
    return [_entry(source.videos, path, label) for path, label in zip(paths, labels, strict=True)]


def read_csv(source: Source) -> list[Entry]:
    """A CSV with a header: `path` (below --videos), optional `label`, optional `split`.

    Other columns are ignored. `--split S` keeps the rows whose `split` is S.
    """
    if source.annotations is None:
        raise UserError("--dataset csv needs --annotations FILE with a header: path,label,...")
    rows = _csv_rows(source.annotations)
    columns = set(rows[0][1]) if rows else set()
    for needed in {"path"} | ({"split"} if source.split else set()):
        if rows and needed not in columns:
            raise UserError(
                f"{source.annotations} has no column '{needed}' (it has: "
                f"{', '.join(sorted(map(str, columns)))})."
            )
    entries, problems = [], []
    for line, row in rows:
        try:
            if None in row or None in row.values():
                raise ValueError("another number of fields than the header")
            if source.split is None or row["split"] == source.split:
                entries.append(_csv_entry(source.videos, row, has_label="label" in columns))
        except ValueError as error:
            problems.append(f"line {line}: {error}")
    _raise_problems(source.annotations, problems)
    return entries


READERS: dict[str, Callable[[Source], list[Entry]]] = {"folder": read_folder, "csv": read_csv}


def label_names(entries: list[Entry]) -> list[str] | None:
    """Sorted names of the labels, whose places are the label numbers; None if there are none."""
    names = {entry.label_name for entry in entries}
    return sorted(str(name) for name in names) if None not in names else None


def safe_key(video_id: str) -> str:
    """A key for tar members: letters, digits, '_' and '-' alone, never leading '-', unique.

    A changed id gets a hash of the original, so two ids never meet in one key.
    """
    flat = video_id.replace("/", "__")
    clean = re.sub(r"[^A-Za-z0-9_-]", "_", flat)
    reversible = not any(part in video_id for part in ("__", "_/", "/_"))
    if clean == flat and not clean.startswith("-") and reversible and len(clean) < _LONGEST_KEY:
        return clean
    digest = hashlib.sha256(video_id.encode("utf-8", "surrogateescape")).hexdigest()[:10]
    return f"{clean[:_LONGEST_KEY].lstrip('-') or 'video'}-{digest}"


def _csv_rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            return [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read --annotations {path}: {error}.") from None


def _csv_entry(videos: Path, row: dict[str, str], *, has_label: bool) -> Entry:
    if not row["path"]:
        raise ValueError("path is empty")
    if has_label and not row["label"]:
        raise ValueError(f"label is empty for {row['path']}")
    path = videos / os.path.normpath(row["path"])
    if not path.resolve().is_relative_to(videos.resolve()):
        raise ValueError(f"path {row['path']} leads out of --videos {videos}")
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    return _entry(videos, path, row["label"] if has_label else None)


def _entry(videos: Path, path: Path, label: str | None) -> Entry:
    relative = path.relative_to(videos)
    return Entry(
        video_id=relative.with_suffix("").as_posix(),
        path=path,
        source_path=relative.as_posix(),
        label_name=label,
    )


def _raise_problems(path: Path, problems: list[str]) -> None:
    if problems:
        more = f"; and {len(problems) - _SHOWN_ERRORS} more" * (len(problems) > _SHOWN_ERRORS)
        raise UserError(
            f"{path} has {len(problems)} bad row(s): " + "; ".join(problems[:_SHOWN_ERRORS]) + more
        )
