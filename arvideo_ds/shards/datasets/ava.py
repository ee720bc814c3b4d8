"""AVA v2.2: one sample for each labelled second of a film, with its boxes by reference.

Rows: `video_id,second,x1,y1,x2,y2,action_id,person_id`, no header, several rows a second,
coordinates 0..1. The rows stay in the annotations file; a sample says which lines are its own.
"""

from __future__ import annotations

import csv
import hashlib
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from arvideo_ds.errors import UserError
from arvideo_ds.shards.datasets.listing import (
    BadRows,
    Entry,
    Listing,
    Option,
    Reader,
    Source,
    VideoTree,
    missing,
    text_lines,
)
from arvideo_ds.shards.manifest import Reject

_FIRST, _LAST = 902, 1798
_ACTIONS = 80
_EXCLUDED = Option("excluded", "file of seconds to leave out")
_FIRST_SECOND = Option("first_second", "second of the film where files begin", float, 0.0)
_WINDOW_S = Option("window_s", "length of a sample", float, 3.0)


def read_ava(source: Source) -> Listing:
    """Windows of --window_s around the labelled seconds that are not excluded."""
    first_second, window_s = source.get(_FIRST_SECOND), source.get(_WINDOW_S)
    if window_s <= 0:
        raise UserError(f"--window_s {window_s:g} must be above 0.")
    path = source.need_annotations("ava_train_v2.2.csv or ava_val_v2.2.csv")
    bad_rows = BadRows(path, skip=source.skip_bad_rows)
    excluded, rejects = _excluded(source.get(_EXCLUDED), skip=source.skip_bad_rows)
    lines: dict[tuple[str, int], list[int]] = defaultdict(list)
    left_out = 0
    for line, text in text_lines(path):
        try:
            keyframe = parse_row(text).keyframe
        except ValueError as error:
            bad_rows.add(line, error)
            continue
        if keyframe in excluded:
            left_out += 1
        else:
            lines[keyframe].append(line)
    tree = VideoTree(source.videos)
    reference = {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    entries: list[Entry] = []
    lost: dict[str, Reject] = {}
    for (video_id, second), own in lines.items():
        try:
            video = tree.find(video_id)
        except ValueError as error:
            bad_rows.add(own[0], error)
            continue
        if video is None:
            lost.setdefault(video_id, missing(video_id, own[0]))
            continue
        middle = second - first_second
        part = (max(0.0, middle - window_s / 2), middle + window_s / 2)
        if part[1] <= 0:
            raise UserError(
                f"second {second} of {video_id} lies before --first_second {first_second:g}."
            )
        facts = {
            "second": second,
            # Where in the sample that is: its window may begin with the film.
            "keyframe_s": middle - part[0],
            "boxes": {**reference, "lines": own},
        }
        entries.append(
            tree.entry(video, None, video_id=f"{video_id}_{second:04d}", part=part, facts=facts)
        )
    rejects += bad_rows.finish()
    notes = [f"{left_out} rows of excluded seconds left out"] if left_out else []
    return Listing(
        tuple(entries), None, (*rejects, *lost.values()), tuple(notes), passed_over=tree.passed_over
    )


class Row(NamedTuple):
    """A box (x1 y1 x2 y2, 0..1) and one action in it, at a second of a film."""

    keyframe: tuple[str, int]
    box: tuple[float, float, float, float]
    action: int


def parse_row(text: str) -> Row:
    """A line of an annotations file. Errors: `ValueError` that says what is wrong."""
    fields = next(csv.reader([text]))
    if len(fields) != 8:
        raise ValueError(f"{len(fields)} fields, expected 8")
    if not fields[0]:
        raise ValueError("the video's id is empty")
    second = _second(fields[1])
    try:
        left, top, right, bottom = map(float, fields[2:6])
        action, _person = int(fields[6]), int(fields[7])
    except ValueError as error:
        raise ValueError(f"not a number: {error}") from None
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise ValueError(f"box {fields[2:6]} is not within 0..1 or is empty")
    if not 1 <= action <= _ACTIONS:
        raise ValueError(f"action {action} is not in 1..{_ACTIONS}")
    return Row((fields[0], second), (left, top, right, bottom), action)


def _second(text: str) -> int:
    if not text.isdigit() or not _FIRST <= int(text) <= _LAST:
        raise ValueError(f"second '{text}' is not in {_FIRST}..{_LAST}")
    return int(text)


def _excluded(path: Path | None, *, skip: bool) -> tuple[set[tuple[str, int]], list[Reject]]:
    if path is None:
        return set(), []
    bad_rows = BadRows(path, skip=skip)
    found = set()
    for line, text in text_lines(path):
        try:
            found.add(parse_excluded(text))
        except ValueError as error:
            bad_rows.add(line, error)
    return found, bad_rows.finish()


def parse_excluded(text: str) -> tuple[str, int]:
    """A line of a file of excluded seconds. Errors: `ValueError` that says what is wrong."""
    video_id, _, second = text.partition(",")
    return video_id, _second(second.strip())


_OPTIONS = (_EXCLUDED, _FIRST_SECOND, _WINDOW_S)
AVA = Reader(read_ava, _OPTIONS, url="https://research.google.com/ava/download.html")
