"""AVA v2.2: one sample for each labelled second of a film, with its boxes by reference.

Rows: `video_id,second,x1,y1,x2,y2,action_id,person_id`, no header, several rows a second,
coordinates 0..1. The rows stay in the annotations file; a sample names its lines.
"""

from __future__ import annotations

import csv
import hashlib
from collections import defaultdict
from dataclasses import replace
from typing import NamedTuple

from arvideo_ds.errors import UserError
from arvideo_ds.shards.datasets.listing import (
    BadRows,
    ClipRows,
    Listing,
    Option,
    Reader,
    Source,
    missing,
    text_lines,
)
from arvideo_ds.shards.manifest import Reject

_FIRST, _LAST = 902, 1798
_ACTIONS = 80
_EXCLUDED = Option("excluded", "file of seconds to exclude")
_FIRST_SECOND = Option("first_second", "second of the film where files begin", float, 0.0)
_WINDOW_S = Option("window_s", "length of a sample", float, 3.0)


def read_ava(source: Source) -> Listing:
    """Windows of --window_s around the labelled seconds that are not excluded."""
    first_second, window_s = source.get(_FIRST_SECOND), source.get(_WINDOW_S)
    if window_s <= 0:
        raise UserError(f"--window_s {window_s:g} must be above 0.")
    path = source.need_annotations("ava_train_v2.2.csv or ava_val_v2.2.csv")
    rows = ClipRows(source, path)
    lines_of: dict[tuple[str, int], list[int]] = defaultdict(list)
    for line, text in text_lines(path):
        with rows.at(line):
            lines_of[parse_row(text).keyframe].append(line)
    num_excluded = 0
    if (excluded := source.get(_EXCLUDED)) is not None:
        bad_excluded = BadRows(excluded, skip=source.skip_bad_rows)
        for line, text in text_lines(excluded):
            with bad_excluded.at(line):
                num_excluded += len(lines_of.pop(parse_excluded(text), ()))
        rows.rejects += bad_excluded.finish()
    if num_excluded:
        rows.notes.append(f"{num_excluded} rows of excluded seconds skipped")
    reference = {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    absent: dict[str, Reject] = {}
    for (video_id, second), lines in lines_of.items():
        with rows.at(lines[0]):
            video = rows.tree.find(video_id)
            if video is None:
                absent.setdefault(video_id, missing(video_id, lines[0]))
                continue
            middle = second - first_second
            part = (max(0.0, middle - window_s / 2), middle + window_s / 2)
            if part[1] <= 0:
                raise UserError(
                    f"second {second} of {video_id} is before --first_second {first_second:g}."
                )
            facts = {
                "second": second,
                # Seconds from the start of the sample, which the film's start may cut.
                "keyframe_s": middle - part[0],
                "boxes": {**reference, "lines": lines},
            }
            name = f"{video_id}_{second:04d}"
            entry = rows.tree.entry(video, None, video_id=name, part=part, facts=facts)
            rows.entries.append(entry)
    listing = rows.listing(None)
    return replace(listing, rejects=(*listing.rejects, *absent.values()))


class BoxRow(NamedTuple):
    """A box (x1 y1 x2 y2, 0..1) with one action. keyframe: id and second of the film."""

    keyframe: tuple[str, int]
    box: tuple[float, float, float, float]
    action: int


def parse_row(text: str) -> BoxRow:
    """A line of an annotations file. Errors: `ValueError`."""
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
    return BoxRow((fields[0], second), (left, top, right, bottom), action)


def _second(text: str) -> int:
    if not text.isdigit() or not _FIRST <= int(text) <= _LAST:
        raise ValueError(f"second '{text}' is not in {_FIRST}..{_LAST}")
    return int(text)


def parse_excluded(text: str) -> tuple[str, int]:
    """Id and second of a line of the excluded seconds. Errors: `ValueError`."""
    video_id, _, second = text.partition(",")
    return video_id, _second(second.strip())


_OPTIONS = (_EXCLUDED, _FIRST_SECOND, _WINDOW_S)
AVA = Reader(read_ava, _OPTIONS, url="https://research.google.com/ava/download.html")
