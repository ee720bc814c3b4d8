"""What the readers share: entries, checks of rows, and the search for the file of a row."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from arvideo_ds.errors import UserError
from arvideo_ds.shards.manifest import Reject
from arvideo_ds.shards.video_files import VIDEO_SUFFIXES, find_videos

_SHOWN = 5
_LONGEST_KEY = 80
# Separators of spreadsheets and databases, and their names.
_OTHER_SEPARATORS = {";": "';'", "\t": "a tab", "|": "'|'"}


@dataclass(frozen=True)
class Entry:
    """One sample to make.

    part: start and stop in seconds, where the sample is a part of a longer video. facts: further
    annotations, stored with the sample unchanged. names_by_set: its label in each label set;
    `label_name` is then the label for tools that know one.
    """

    video_id: str
    path: Path
    source_path: str
    label_name: str | None
    part: tuple[float, float] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    names_by_set: dict[str, str] | None = None


@dataclass(frozen=True)
class Listing:
    """The samples of a data set. `labels` are in the order of their numbers.

    label_sets: names of each set, where samples have several labels. rejects: rows without a
    sample. notes: for the user before the work begins, such as counts that differ from the
    published ones. passed_over: number of other files below the videos folder, by suffix.
    """

    entries: tuple[Entry, ...]
    labels: tuple[str, ...] | None
    rejects: tuple[Reject, ...] = ()
    notes: tuple[str, ...] = ()
    label_sets: dict[str, tuple[str, ...]] | None = None
    passed_over: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Option:
    """An option of the command line, --name. type: parses a value. several: takes a list."""

    name: str
    help: str
    type: Callable[[str], Any] = Path
    default: Any = None
    several: bool = False


LABELS = Option("labels", "file of class names, in order")


class Source:
    """The user's paths and options. options: the given options of the reader, by name."""

    def __init__(
        self,
        videos: Path,
        annotations: Path | None = None,
        split: str | None = None,
        *,
        skip_bad_rows: bool = False,
        **options: Any,
    ) -> None:
        self.videos, self.annotations, self.split = videos, annotations, split
        self.skip_bad_rows = skip_bad_rows
        self.options = {name: value for name, value in options.items() if value is not None}

    def get(self, option: Option) -> Any:
        return self.options.get(option.name, option.default)

    def need_annotations(self, what: str) -> Path:
        """The path of --annotations. what: names the file for the error."""
        if self.annotations is None:
            raise UserError(f"--annotations is needed: {what}.")
        if not self.annotations.exists():
            raise UserError(f"--annotations {self.annotations} does not exist.")
        return self.annotations


@dataclass(frozen=True)
class Reader:
    """How a data set is read, and the rules for training on it.

    read: checks every row and returns the entries. split: what --split means. flip: False where
    labels tell left from right, so that no task may flip. sampling: "uniform" where labels need the
    whole video. stride: of the data set's usual clips, for `TranscodeSettings.layers`. label_sets:
    names, where a sample has several labels. url: of the annotations. suffixes: of its files.
    """

    read: Callable[[Source], Listing]
    options: tuple[Option, ...] = ()
    split: str = ""
    flip: bool = True
    sampling: Literal["uniform"] | None = None
    stride: int = 4
    label_sets: tuple[str, ...] = ()
    url: str = ""
    suffixes: frozenset[str] = VIDEO_SUFFIXES


class BadRows:
    """The wrong rows of a file: one error, or rejects with `skip`. unit: of the row numbers."""

    def __init__(self, path: Path, *, skip: bool, unit: str = "line") -> None:
        self._path, self._skip, self._unit = path, skip, unit
        self._problems: list[str] = []
        self._first: dict[str, int] = {}

    def require_new(self, line: int, video_id: str) -> None:
        """Errors: `ValueError` where another line has the same id."""
        first = self._first.setdefault(video_id, line)
        if first != line:
            raise ValueError(f"'{video_id}' is already in {self._unit} {first}")

    def add(self, line: int, message: object) -> None:
        self._problems.append(f"{self._unit} {line}: {message}")

    @contextlib.contextmanager
    def at(self, line: int) -> Iterator[None]:
        """A `ValueError` in this context makes the line a bad row."""
        try:
            yield
        except ValueError as error:
            self.add(line, error)

    def finish(self) -> list[Reject]:
        """Errors: `UserError` with the first problems, unless they are skipped."""
        if self._problems and not self._skip:
            more = f"; and {len(self._problems) - _SHOWN} more" * (len(self._problems) > _SHOWN)
            raise UserError(
                f"{self._path} has {len(self._problems)} bad row(s): "
                + "; ".join(self._problems[:_SHOWN])
                + more
                + ". Correct them, or skip them with --skip_bad_rows."
            )
        return [
            Reject(source_path=str(self._path.name), reason="bad_row", message=problem)
            for problem in self._problems
        ]


class VideoTree:
    """The video files below a folder, by name without suffix. Links to files are followed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._by_stem: dict[str, list[Path]] = defaultdict(list)
        self.passed_over = Counter[str]()
        for path in find_videos(root, self.passed_over):
            # Path.is_file raises for a link that may not be followed.
            if not path.is_symlink() or os.path.isfile(path):  # noqa: PTH113
                self._by_stem[path.stem].append(path)

    def stems(self) -> Iterator[str]:
        return iter(self._by_stem)

    def find(self, stem: str, folder: str = "") -> Path | None:
        """The file of that name; of several, the one in `folder`. Errors: `ValueError`."""
        paths = self._by_stem.get(stem, [])
        if len(paths) > 1:
            paths = [path for path in paths if path.parent.name == folder] or paths
        if len(paths) > 1:
            raise ValueError(f"'{stem}' could be {paths[0]} or {paths[1]}")
        return paths[0] if paths else None

    def entry(self, path: Path, label: str | None, **details: Any) -> Entry:
        """An entry. Its default id is the path below the root, without suffix."""
        return file_entry(self.root, path, label, **details)


class ClipRows(BadRows):
    """The rows of a data set's annotations, with the entries, rejects and notes that follow."""

    def __init__(
        self, source: Source, path: Path, *, unit: str = "line", tree: VideoTree | None = None
    ) -> None:
        super().__init__(path, skip=source.skip_bad_rows, unit=unit)
        self.tree = tree or VideoTree(source.videos)
        self.entries: list[Entry] = []
        self.rejects: list[Reject] = []
        self.notes: list[str] = []

    def find(
        self, line: int, stem: str, label: str | None, folder: str = "", name: str = "", **more: Any
    ) -> None:
        """Add the entry of a row, with the fields `more`, or a reject under `name` or the stem.

        folder: as in `VideoTree.find`. Errors: `ValueError` for a bad row.
        """
        path = self.tree.find(stem, folder)
        self.require_new(line, more.get("video_id", stem))
        if path is None:
            self.rejects.append(missing(name or stem, line))
        else:
            self.entries.append(self.tree.entry(path, label, **more))

    def compare(self, what: str, count: int, published: int | None) -> None:
        """Add a note, where a count differs from the published one."""
        if published is not None and count != published:
            self.notes.append(f"{count:,} {what}; the published set has {published:,}")

    def listing(self, labels: Iterable[str] | None, **label_sets: tuple[str, ...]) -> Listing:
        """Errors: as `finish`."""
        return Listing(
            tuple(self.entries),
            None if labels is None else tuple(labels),
            (*self.rejects, *self.finish()),
            tuple(self.notes),
            label_sets or None,
            passed_over=self.tree.passed_over,
        )


def file_entry(root: Path, path: Path, label: str | None, **details: Any) -> Entry:
    relative = path.relative_to(root)
    details.setdefault("video_id", relative.with_suffix("").as_posix())
    return Entry(path=path, source_path=relative.as_posix(), label_name=label, **details)


def missing(name: str, line: int | None = None) -> Reject:
    """A clip of the annotations without a file."""
    where = f" (line {line} of the annotations)" if line is not None else ""
    return Reject(source_path=name, reason="missing", message=f"no such file{where}")


def csv_rows(
    path: Path, needed: Sequence[str], bad_rows: BadRows
) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and row of a CSV with a header; rows of another length are bad rows.

    Errors: `UserError` where the file is unreadable, lacks a column or is not separated by commas.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            # The header may be "path, label": names and values then begin after the space.
            spaced = ", " in file.readline()
            file.seek(0)
            reader = csv.DictReader(file, skipinitialspace=spaced)
            columns = list(reader.fieldnames or ())
            absent = [column for column in needed if column not in columns]
            if columns and absent:
                _require_commas(path, ",".join(columns), needed)
                listed = ", ".join(sorted(set(columns)))
                raise UserError(f"{path} has no column '{absent[0]}' (it has: {listed}).")
            for row in reader:
                if None in row or None in row.values():
                    bad_rows.add(reader.line_num, "another number of fields than the header")
                else:
                    yield reader.line_num, row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}.") from None


def _require_commas(path: Path, header: str, needed: Sequence[str]) -> None:
    """Errors: `UserError` where the header has the columns with another separator."""
    for separator, name in _OTHER_SEPARATORS.items():
        columns = [column.strip(' "') for column in header.split(separator)]
        if len(columns) > 1 and all(column in columns for column in needed):
            raise UserError(
                f"{path} line 1: the separator must be a comma, but the header has {name} between "
                "its columns. Save the file with commas (a spreadsheet: as CSV, comma-separated)."
            )


def text_lines(path: Path) -> list[tuple[int, str]]:
    """Number and text of the lines that are not empty. Errors: `UserError`."""
    try:
        # Not splitlines(): it also splits at characters that a JSON string may contain.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}.") from None
    return [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]


def json_file(path: Path, kind: type) -> Any:
    """The content of a JSON file, of type `kind`. Errors: `UserError`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}.") from None
    if not isinstance(content, kind):
        raise UserError(f"{path} contains a {type(content).__name__}, expected a {kind.__name__}.")
    return content


def class_names(path: Path, used: Iterable[str]) -> tuple[str, ...]:
    """The class names of a file, one per line, in the order of their numbers.

    Errors: `UserError` where a name is repeated, or a used label is missing.
    """
    names = tuple(line for _, line in text_lines(path))
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{path} has the label '{twice[0]}' twice; each line is one class.")
    if unknown := sorted(set(used) - set(names)):
        raise UserError(f"{path} lacks the label '{unknown[0]}' that is in use.")
    return names


def safe_key(video_id: str) -> str:
    """A unique key for tar members of letters, digits, '_' and '-', without a leading '-'.

    A changed id gets a hash of the original.
    """
    flat = video_id.replace("/", "__")
    clean = re.sub(r"[^A-Za-z0-9_-]", "_", flat)
    reversible = not any(part in video_id for part in ("__", "_/", "/_"))
    if clean == flat and not clean.startswith("-") and reversible and len(clean) < _LONGEST_KEY:
        return clean
    digest = hashlib.sha256(video_id.encode("utf-8", "surrogateescape")).hexdigest()[:10]
    return f"{clean[:_LONGEST_KEY].lstrip('-') or 'video'}-{digest}"
