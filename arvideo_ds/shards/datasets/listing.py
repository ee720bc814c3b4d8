"""What every reader shares: entries, row checks, and finding the file that a row means."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from arvideo_ds.errors import UserError
from arvideo_ds.shards.manifest import Reject
from arvideo_ds.shards.video_files import find_videos

_SHOWN = 5
_LONGEST_KEY = 80
# What spreadsheets and databases write instead of commas, and what to call it.
_OTHER_SEPARATORS = {";": "';'", "\t": "a tab", "|": "'|'"}


@dataclass(frozen=True)
class Entry:
    """One sample to make.

    part: start and stop in seconds where it is a part of a longer video. facts: what else the
    annotations say of it; stored with the sample as they are. names_by_set: its label in each of
    several label sets; `label_name` is then the one for tools that know one label.
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
    """What a data set holds here. `labels` are in the order of their numbers.

    label_sets: where samples have several labels, the names of each set. rejects: rows that lead to
    no sample, known before any work. notes: what the user should read before it starts, such as
    counts that differ from the published ones. passed_over: files below the videos folder whose
    suffix is not a video's, by suffix.
    """

    entries: tuple[Entry, ...]
    labels: tuple[str, ...] | None
    rejects: tuple[Reject, ...] = ()
    notes: tuple[str, ...] = ()
    label_sets: dict[str, tuple[str, ...]] | None = None
    passed_over: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Option:
    """An option of the command line that a reader takes: --name.

    type: makes its value of a text. several: it takes one value or more, as a list.
    """

    name: str
    help: str
    type: Callable[[str], Any] = Path
    default: Any = None
    several: bool = False


LABELS = Option("labels", "file of class names, in order")


class Source:
    """Where the user says the data set lies. options: those of its reader that were given."""

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

    @property
    def labels(self) -> Path | None:
        """A file of class names, where the annotations do not settle the labels' numbers."""
        return self.get(LABELS)

    def get(self, option: Option) -> Any:
        return self.options.get(option.name, option.default)

    def need_annotations(self, what: str) -> Path:
        """The annotations, which this data set cannot do without."""
        if self.annotations is None:
            raise UserError(f"--annotations is needed: {what}.")
        if not self.annotations.exists():
            raise UserError(f"--annotations {self.annotations} does not exist.")
        return self.annotations


@dataclass(frozen=True)
class Reader:
    """One data set: how it is read, and what training must obey.

    read: what is on disk -> entries, after every row was checked. split: what --split means. flip:
    False where labels tell left from right, so that no task may flip. sampling: what the labels
    need where that is not free; "uniform" is the whole video. label_sets: names, where a sample has
    several labels. url: where the annotations come from.
    """

    read: Callable[[Source], Listing]
    options: tuple[Option, ...] = ()
    split: str = ""
    flip: bool = True
    sampling: Literal["uniform"] | None = None
    label_sets: tuple[str, ...] = ()
    url: str = ""


class BadRows:
    """Collects wrong rows; at the end they stop the work, or are left out and counted."""

    def __init__(self, path: Path, *, skip: bool, unit: str = "line") -> None:
        self._path, self._skip, self._unit = path, skip, unit
        self._problems: list[str] = []
        self._first: dict[str, int] = {}

    def require_new(self, line: int, video_id: str) -> None:
        """Errors: `ValueError` where a row before has the same id."""
        first = self._first.setdefault(video_id, line)
        if first != line:
            raise ValueError(f"'{video_id}' stands in {self._unit} {first} already")

    def add(self, line: int, message: object) -> None:
        self._problems.append(f"{self._unit} {line}: {message}")

    def finish(self) -> list[Reject]:
        """Errors: `UserError` with the first problems, unless they are to be skipped."""
        if self._problems and not self._skip:
            more = f"; and {len(self._problems) - _SHOWN} more" * (len(self._problems) > _SHOWN)
            raise UserError(
                f"{self._path} has {len(self._problems)} bad row(s): "
                + "; ".join(self._problems[:_SHOWN])
                + more
                + ". Correct them, or leave them out with --skip_bad_rows."
            )
        return [
            Reject(source_path=str(self._path.name), reason="bad_row", message=problem)
            for problem in self._problems
        ]


class VideoTree:
    """The video files below a folder, by name without suffix.

    Links to files are followed wherever they lead: CVDF's class folders are made of links. What the
    annotations say is only ever looked up among these names.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._by_stem: dict[str, list[Path]] = defaultdict(list)
        self.passed_over = Counter[str]()
        for path in find_videos(root, self.passed_over):
            if not path.is_symlink() or _is_file(path):
                self._by_stem[path.stem].append(path)

    def stems(self) -> Iterator[str]:
        return iter(self._by_stem)

    def find(self, stem: str, folder: str | None = None) -> Path | None:
        """The file of that name; where several folders have one, that in `folder`.

        Errors: `ValueError` when it is not clear which is meant.
        """
        found = self._by_stem.get(stem, [])
        if len(found) > 1:
            found = [path for path in found if path.parent.name == folder] or found
        if len(found) > 1:
            raise ValueError(f"'{stem}' could be {found[0]} or {found[1]}")
        return found[0] if found else None

    def entry(self, path: Path, label: str | None, **details: Any) -> Entry:
        """An entry whose id is its path below the root, without suffix."""
        return file_entry(self.root, path, label, **details)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, RuntimeError):  # links in a circle
        return False


def file_entry(root: Path, path: Path, label: str | None, **details: Any) -> Entry:
    relative = path.relative_to(root)
    details.setdefault("video_id", relative.with_suffix("").as_posix())
    return Entry(path=path, source_path=relative.as_posix(), label_name=label, **details)


def missing(name: str, line: int | None = None) -> Reject:
    """A clip that the annotations name and the folder lacks."""
    where = f" (line {line} of the annotations)" if line is not None else ""
    return Reject(source_path=name, reason="missing", message=f"no such file{where}")


def csv_rows(
    path: Path, needed: Iterable[str], bad_rows: BadRows
) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and row of a CSV with a header; rows of another length are bad rows.

    Errors: `UserError` when the file cannot be read, lacks a column, or has another separator than
    the comma.
    """
    needed = list(needed)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            # Some write "path, label": then neither names nor values begin with the space.
            spaced = ", " in file.readline()
            file.seek(0)
            reader = csv.DictReader(file, skipinitialspace=spaced)
            columns = set(reader.fieldnames or ())
            for column in needed:
                if columns and column not in columns:
                    _require_commas(path, ",".join(reader.fieldnames or ()), needed)
                    raise UserError(
                        f"{path} has no column '{column}' (it has: {', '.join(sorted(columns))})."
                    )
            for row in reader:
                if None in row or None in row.values():
                    bad_rows.add(reader.line_num, "another number of fields than the header")
                else:
                    yield reader.line_num, row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}.") from None


def _require_commas(path: Path, header: str, needed: Iterable[str]) -> None:
    """Errors: `UserError` where the header has the columns, but something else between them."""
    for separator, name in _OTHER_SEPARATORS.items():
        columns = [column.strip(' "') for column in header.split(separator)]
        if len(columns) > 1 and all(column in columns for column in needed):
            raise UserError(
                f"{path} line 1: the separator must be a comma, but the header has {name} between "
                "its columns. Save the file with commas (a spreadsheet: as CSV, comma-separated)."
            )


def text_lines(path: Path) -> list[tuple[int, str]]:
    """Number and text of the lines that are not empty."""
    try:
        # Not splitlines(): it also ends lines at characters that a JSON string may hold.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}.") from None
    return [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]


def json_file(path: Path, kind: type) -> Any:
    """The content of a JSON file that must be a list or a dict."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}.") from None
    if not isinstance(content, kind):
        raise UserError(f"{path} holds a {type(content).__name__}, expected a {kind.__name__}.")
    return content


def number_labels(source: Source, entries: Sequence[Entry]) -> tuple[str, ...] | None:
    """Names in the order of their numbers: of --labels, else the entries' own, sorted.

    None where the entries have no labels. Errors: `UserError` where --labels does not fit them.
    """
    names = {entry.label_name for entry in entries}
    if source.labels is None:
        return tuple(sorted(str(name) for name in names)) if None not in names else None
    if None in names:
        raise UserError(
            f"--labels {source.labels} is given, but the videos have no labels: those come from "
            "class folders, or from `label` in the rows."
        )
    return class_names(source.labels, (str(name) for name in names))


def class_names(path: Path, used: Iterable[str]) -> tuple[str, ...]:
    """Names of classes, one a line, in the order of their numbers.

    Errors: `UserError` where one stands twice, or a label in use is not among them.
    """
    names = tuple(line for _, line in text_lines(path))
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{path} has the label '{twice[0]}' twice; each line is one class.")
    unknown = sorted(set(used) - set(names))
    if unknown:
        raise UserError(f"{path} lacks the label '{unknown[0]}' that is in use.")
    return names


def compare_count(what: str, found: int, published: int | None) -> list[str]:
    """A note where a count differs from the published one."""
    if published is None or found == published:
        return []
    return [f"{found:,} {what}; the published set has {published:,}"]


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
