"""EPIC-KITCHENS-100: one sample for each narrated action, cut from the long videos.

EPIC_100_train.csv and EPIC_100_validation.csv have verb_class and noun_class;
EPIC_100_test_timestamps.csv has neither. Both are label sets, "verb" and "noun"; tools that know
one label use the verb. Frame numbers in the files assume the rate of the released videos (50 or
59.94 Hz), so samples are cut by timestamps, which suit copies of any rate.
"""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path

from arvideo_ds.errors import UserError
from arvideo_ds.shards.datasets.listing import (
    LABELS,
    BadRows,
    ClipRows,
    Listing,
    Option,
    Reader,
    Source,
    csv_rows,
)

_CLASSES = {"verb": 97, "noun": 300}
_NOUNS = Option("nouns", "file of the nouns' names")
_OPTIONS = {"verb": "--labels", "noun": "--nouns"}
_ROWS = {"EPIC_100_train": 67_217, "EPIC_100_validation": 9_668}


def read_epic_kitchens(source: Source) -> Listing:
    """Rows of the CSV; --labels EPIC_100_verb_classes.csv names the verbs, --nouns the nouns."""
    path = source.need_annotations("EPIC_100_train.csv, _validation.csv or _test_timestamps.csv")
    files = {"verb": source.get(LABELS), "noun": source.get(_NOUNS)}
    sets = {name: _names(name, file) for name, file in files.items()}
    rows = ClipRows(source, path)
    count = 0
    labelled = False
    needed = ["narration_id", "video_id", "start_timestamp", "stop_timestamp"]
    for line, row in csv_rows(path, needed, rows):
        count += 1
        labelled = "verb_class" in row
        if labelled != ("noun_class" in row):
            present, absent = ("verb", "noun") if labelled else ("noun", "verb")
            raise UserError(
                f"{path} has a column '{present}_class' and none '{absent}_class'. The release's "
                "files have both, or neither (test); use one of these."
            )
        with rows.at(line):
            narration_id, video_id = row["narration_id"], row["video_id"]
            if not (narration_id and video_id):
                raise ValueError("narration_id or video_id is empty")
            part = _seconds(row["start_timestamp"]), _seconds(row["stop_timestamp"])
            if part[0] >= part[1]:
                raise ValueError("the action stops before it starts")
            names, facts = _classes(row, sets) if labelled else ({}, {})
            rows.find(
                line,
                video_id,
                names.get("verb"),
                name=f"{video_id} for {narration_id}",
                video_id=narration_id,
                part=part,
                facts=facts,
                names_by_set=names or None,
            )
    rows.compare(f"rows in {path.name}", count, _ROWS.get(path.stem))
    if not labelled:
        given = [_OPTIONS[name] for name, file in files.items() if file is not None]
        rows.notes += [f"{path.name} has no labels; {' and '.join(given)} is ignored"] * bool(given)
        return rows.listing(None)
    for name, file in files.items():
        if file is not None:
            rows.compare(f"{name}s in {file.name}", len(sets[name]), _CLASSES[name])
        elif any(files.values()):
            rows.notes.append(f"the {name}s have numbers as names: {_OPTIONS[name]} names them")
    return rows.listing(sets["verb"], **sets)


def _names(name: str, path: Path | None) -> tuple[str, ...]:
    """Class names in the order of their numbers; the numbers themselves without a file."""
    if path is None:
        return tuple(str(number) for number in range(_CLASSES[name]))
    bad_rows = BadRows(path, skip=False)
    rows = list(csv_rows(path, ["id", "key"], bad_rows))
    bad_rows.finish()
    if [row["id"] for _, row in rows] != [str(number) for number in range(len(rows))]:
        raise UserError(f"{path}: ids are not 0, 1, 2, ... in order.")
    for other, count in _CLASSES.items():
        if other != name and len(rows) == count:
            raise UserError(
                f"{_OPTIONS[name]} {path} has {count} classes, the number of {other}s; "
                f"{_OPTIONS[name]} expects the file of the {name}s "
                f"(EPIC_100_{name}_classes.csv), {_OPTIONS[other]} the file of the {other}s."
            )
    return tuple(row["key"] for _, row in rows)


def _classes(
    row: dict[str, str], sets: dict[str, tuple[str, ...]]
) -> tuple[dict[str, str], dict[str, object]]:
    """The names of verb and noun, and the facts."""
    names: dict[str, str] = {}
    facts: dict[str, object] = {}
    for name, classes in sets.items():
        column = f"{name}_class"
        text = row.get(column, "")
        if not text.isdigit() or int(text) >= len(classes):
            raise ValueError(f"{column} '{text}' is not in 0..{len(classes) - 1}")
        names[name], facts[column] = classes[int(text)], int(text)
    return names, {**facts, "narration": row.get("narration")}


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+):([0-5]\d):([0-5]\d(?:\.\d+)?)", text)
    if match is None:
        raise ValueError(f"'{text}' is not a time HH:MM:SS.ss")
    # Added exactly and rounded once: in floats 60 + 8.96 > 68.96, which would miss that frame.
    return float(3600 * int(match[1]) + 60 * int(match[2]) + Fraction(match[3]))


EPIC_KITCHENS = Reader(
    read_epic_kitchens,
    (LABELS, _NOUNS),
    stride=1,
    label_sets=tuple(_CLASSES),
    url="https://github.com/epic-kitchens/epic-kitchens-100-annotations",
)
