"""EPIC-KITCHENS-100: one sample for each narrated action, cut from the long videos.

EPIC_100_train.csv and EPIC_100_validation.csv have verb_class and noun_class;
EPIC_100_test_timestamps.csv has neither. The label is the verb; the noun stands in the facts.
"""

from __future__ import annotations

import re
from fractions import Fraction

from arvideo_ds.data.datasets.listing import (
    BadRows,
    Entry,
    Listing,
    Source,
    VideoTree,
    compare_count,
    csv_rows,
    missing,
)
from arvideo_ds.data.manifest import Reject
from arvideo_ds.errors import UserError

_VERBS, _NOUNS = 97, 300
_ROWS = {"EPIC_100_train": 67_217, "EPIC_100_validation": 9_668}


def read_epic_kitchens(source: Source) -> Listing:
    """Rows of the CSV; --labels EPIC_100_verb_classes.csv names the verbs."""
    path = source.need_annotations("EPIC_100_train.csv, _validation.csv or _test_timestamps.csv")
    bad_rows = BadRows(path, skip=source.skip_bad_rows)
    verbs = _verbs(source)
    tree = VideoTree(source.videos)
    entries: list[Entry] = []
    rejects: list[Reject] = []
    rows = 0
    labelled = True
    needed = ["narration_id", "video_id", "start_timestamp", "stop_timestamp"]
    for line, row in csv_rows(path, needed, bad_rows):
        rows += 1
        labelled = "verb_class" in row
        try:
            if not (row["narration_id"] and row["video_id"]):
                raise ValueError("narration_id or video_id is empty")
            video = tree.find(row["video_id"])
            part = _seconds(row["start_timestamp"]), _seconds(row["stop_timestamp"])
            if part[0] >= part[1]:
                raise ValueError("the action stops before it starts")
            label, facts = _classes(row, verbs) if labelled else (None, {})
            bad_rows.require_new(line, row["narration_id"])
        except ValueError as error:
            bad_rows.add(line, error)
            continue
        if video is None:
            rejects.append(missing(f"{row['video_id']} for {row['narration_id']}", line))
        else:
            details = {"video_id": row["narration_id"], "part": part, "facts": facts}
            entries.append(tree.entry(video, label, **details))
    rejects += bad_rows.finish()
    notes = compare_count(f"rows in {path.name}", rows, _ROWS.get(path.stem))
    return Listing(tuple(entries), tuple(verbs) if labelled else None, tuple(rejects), tuple(notes))


def _verbs(source: Source) -> list[str]:
    if source.labels is None:
        return [str(number) for number in range(_VERBS)]
    bad_rows = BadRows(source.labels, skip=False)
    rows = list(csv_rows(source.labels, ["id", "key"], bad_rows))
    bad_rows.finish()
    if [row["id"] for _, row in rows] != [str(number) for number in range(len(rows))]:
        raise UserError(f"{source.labels}: ids are not 0, 1, 2, ... in order.")
    return [row["key"] for _, row in rows]


def _classes(row: dict[str, str], verbs: list[str]) -> tuple[str, dict[str, object]]:
    verb, noun = row["verb_class"], row.get("noun_class", "")
    if not verb.isdigit() or int(verb) >= len(verbs):
        raise ValueError(f"verb_class '{verb}' is not in 0..{len(verbs) - 1}")
    if not noun.isdigit() or int(noun) >= _NOUNS:
        raise ValueError(f"noun_class '{noun}' is not in 0..{_NOUNS - 1}")
    facts: dict[str, object] = {
        "verb_class": int(verb),
        "noun_class": int(noun),
        "narration": row.get("narration"),
    }
    return verbs[int(verb)], facts


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+):([0-5]\d):([0-5]\d(?:\.\d+)?)", text)
    if match is None:
        raise ValueError(f"'{text}' is no time HH:MM:SS.ss")
    # Added exactly and rounded once: in floats 60 + 8.96 is more than 68.96, and the frame at that
    # very time would be missed.
    return float(3600 * int(match[1]) + 60 * int(match[2]) + Fraction(match[3]))
