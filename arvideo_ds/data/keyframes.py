"""Boxes of AVA's keyframes: of the annotations and of a person detector.

A sample lists its lines of the annotations file; detected boxes are found by film and second.
"""

from __future__ import annotations

import csv
import functools
import hashlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from arvideo_ds.data.boxes import best_match
from arvideo_ds.errors import UserError
from arvideo_ds.shards.datasets.ava import parse_excluded, parse_row
from arvideo_ds.shards.datasets.listing import text_lines
from arvideo_ds.shards.manifest import ShardSet
from arvideo_ds.shards.members import Facts, read_facts

# Film and second.
Keyframe = tuple[str, int]
# Parsed facts of so many shards are cached; a window of the order spans few.
_OPEN_SHARDS = 64
_FORMAT = "video_id,second,x1,y1,x2,y2,score (or with a column before the score, which is not read)"


@dataclass(frozen=True)
class Annotations:
    """An annotations file by line: line i + 1 is boxes[i] (x1 y1 x2 y2, 0..1), actions[i].
    keyframes: indices of their lines. Lines without a valid row have action 0; `bad_rows` counts
    those that are not empty."""

    path: Path
    sha256: str
    boxes: np.ndarray
    actions: np.ndarray
    keyframes: Mapping[Keyframe, np.ndarray]
    bad_rows: int


class SampleKeyframe(NamedTuple):
    """From a sample's facts: its keyframe, the number of that frame, its annotated lines."""

    keyframe: Keyframe
    frame: int
    lines: np.ndarray


@dataclass(frozen=True)
class KeyframeBoxes:
    """Boxes n 4 (shares of the frame), targets n A (bool; the actions in each), and scores n of the
    person detector; 1 for annotated boxes."""

    keyframe: Keyframe
    frame: int
    boxes: np.ndarray
    targets: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True)
class Detected:
    """Boxes n 4 (shares of the frame) and scores n of a person detector in one keyframe."""

    boxes: np.ndarray
    scores: np.ndarray


class BoxSource:
    """Shard and place in it -> the boxes of that keyframe.

    annotations: the file that the shards were made from. detections: as of `read_detections`.
    truth: include annotated boxes beside detected ones. Errors: `UserError` where the shards were
    made from another file, or an action is above `num_actions`.
    """

    def __init__(
        self,
        shards: ShardSet,
        annotations: Annotations,
        *,
        detections: Mapping[Keyframe, Detected] | None,
        truth: bool,
        num_actions: int,
        match_iou: float = 0.5,
    ) -> None:
        shards.require_own()
        most = int(annotations.actions.max(initial=0))
        if most > num_actions:
            raise UserError(
                f"{annotations.path} has action {most}, above detect.num_actions={num_actions}."
            )
        self._shards, self._annotations = shards, annotations
        self._detections, self._truth = detections, truth
        self._num_actions, self._match_iou = num_actions, match_iou
        self.places(0)  # raise errors at the start, not in a worker

    def __call__(self, shard: int, member: int) -> KeyframeBoxes:
        keyframe, frame, lines = self.places(shard)[member]
        # Rows of one box and one action each -> boxes with all their actions.
        boxes, box_of = np.unique(self._annotations.boxes[lines], axis=0, return_inverse=True)
        targets = np.zeros((len(boxes), self._num_actions), dtype=bool)
        targets[box_of.reshape(-1), self._annotations.actions[lines] - 1] = True
        parts = [(boxes, targets, np.ones(len(boxes)))]
        if self._detections is not None:
            empty = Detected(np.zeros((0, 4)), np.zeros(0))
            found = self._detections.get(keyframe, empty)
            matched = self._matched(found.boxes, boxes, targets)
            detected = (found.boxes, matched, found.scores)
            parts = [*parts, detected] if self._truth else [detected]
        return KeyframeBoxes(keyframe, frame, *map(np.concatenate, zip(*parts, strict=True)))

    def nothing(self) -> KeyframeBoxes:
        """No boxes, for a keyframe that cannot be read."""
        boxes, targets = np.zeros((0, 4)), np.zeros((0, self._num_actions), dtype=bool)
        return KeyframeBoxes(("", 0), 0, boxes, targets, np.zeros(0))

    @functools.lru_cache(maxsize=_OPEN_SHARDS)  # noqa: B019  lives as long as its reader
    def places(self, shard: int) -> list[SampleKeyframe]:
        """The keyframes of a shard's samples."""
        path = self._shards.path(shard)
        facts = read_facts(path, self._shards.index(shard).samples)
        return [self._place(path, fact) for fact in facts]

    def _place(self, path: Path, facts: Facts) -> SampleKeyframe:
        ava: dict[str, Any] = facts.model_extra or {}
        if not ava.get("boxes"):
            raise UserError(
                f"{path}: {facts.video_id} has no boxes; detection needs shards of "
                "arvideo shards --dataset ava."
            )
        if ava["boxes"]["sha256"] != self._annotations.sha256:
            raise UserError(
                f"{path} was made from another {ava['boxes']['file']} than "
                f"{self._annotations.path}: their contents differ. Give the file that the shards "
                "were made from, or make them again."
            )
        start, stop = ava["part"]
        middle = ava.get("keyframe_s", (stop - start) / 2)
        frame = min(round(middle * facts.fps), facts.num_frames - 1)
        film = facts.video_id.rpartition("_")[0]
        return SampleKeyframe((film, ava["second"]), frame, np.array(ava["boxes"]["lines"]) - 1)

    def _matched(self, found: np.ndarray, boxes: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Actions of detected boxes: those of the box that overlaps by `match_iou` or more."""
        if not len(boxes) or not len(found):
            return np.zeros((len(found), self._num_actions), dtype=bool)
        best, iou = best_match(found, boxes)
        return targets[best] & (iou >= self._match_iou)[:, None]


def read_annotations(path: str | None, key: str) -> Annotations:
    """An annotations file of AVA; `key` is its setting, for errors. Wrong rows are counted. Errors:
    `UserError` if `path` is None or has no valid row."""
    if path is None:
        raise UserError(
            f"{key} is not given: the file of boxes that the shards were made from, such as "
            "ava_train_v2.2.csv."
        )
    lines = text_lines(Path(path))
    count = lines[-1][0] if lines else 0
    boxes, actions = np.zeros((count, 4)), np.zeros(count, dtype=np.int64)
    keyframes: dict[Keyframe, list[int]] = defaultdict(list)
    bad_rows = 0
    for number, text in lines:
        try:
            row = parse_row(text)
        except ValueError:
            bad_rows += 1
            continue
        boxes[number - 1], actions[number - 1] = row.box, row.action
        keyframes[row.keyframe].append(number - 1)
    if not keyframes:
        raise UserError(f"{key}={path} has no row of AVA's annotations among its {count} lines.")
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    indices = {keyframe: np.array(own) for keyframe, own in keyframes.items()}
    return Annotations(Path(path), digest, boxes, actions, indices, bad_rows)


def read_detections(path: str, key: str, min_score: float) -> dict[Keyframe, Detected]:
    """Boxes of a person detector with at least `min_score`, by keyframe, best first.

    The usual CSV of AVA without header: `_FORMAT`. Boxes are clipped to 0..1; a box that is listed
    several times (for several actions) counts once, with its best score. Errors: `UserError` that
    names the line, or if no box remains.
    """
    best: dict[Keyframe, dict[tuple[float, ...], float]] = defaultdict(dict)
    for number, text in text_lines(Path(path)):
        try:
            keyframe, box, score = _detection(text)
        except ValueError as error:
            raise UserError(f"{key}={path}, line {number}: {error}; expected {_FORMAT}.") from None
        if score >= min_score:
            best[keyframe][box] = max(score, best[keyframe].get(box, 0.0))
    if not best:
        raise UserError(f"{key}={path} has no box with a score of {min_score} or more.")
    detections = {}
    for keyframe, scores in best.items():
        boxes = sorted(scores, key=lambda box: -scores[box])
        detections[keyframe] = Detected(np.array(boxes), np.array([scores[box] for box in boxes]))
    return detections


def _detection(text: str) -> tuple[Keyframe, tuple[float, ...], float]:
    fields = next(csv.reader([text]))
    if len(fields) not in (7, 8):
        raise ValueError(f"{len(fields)} fields")
    *sides, score = map(float, (*fields[2:6], fields[-1]))
    if not np.isfinite((*sides, score)).all():
        raise ValueError(f"box {fields[2:6]} or score '{fields[-1]}' is not finite")
    box = tuple(min(1.0, max(0.0, side)) for side in sides)
    if not (box[0] < box[2] and box[1] < box[3]):
        raise ValueError(f"box {fields[2:6]} is empty within 0..1")
    return (fields[0], int(fields[1])), box, score


def read_excluded(path: str | None) -> set[Keyframe]:
    """Keyframes that do not count. Errors: `UserError` that names the line."""
    excluded = set()
    for number, text in text_lines(Path(path)) if path is not None else ():
        try:
            excluded.add(parse_excluded(text))
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}.") from None
    return excluded
