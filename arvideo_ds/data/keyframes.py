"""The boxes of AVA's keyframes: of the annotations, which samples refer to, and of a detector.

A sample of AVA says which lines of which annotations file are its own (datasets/ava.py); detected
boxes are found by film and second.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
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
# Parsed facts of so many shards are kept; a window of the order spans few.
_OPEN_SHARDS = 64
_FORMAT = "video_id,second,x1,y1,x2,y2,score (or with a column before the score, which is not read)"


@dataclass(frozen=True)
class Annotations:
    """An annotations file, line by line: line i + 1 is boxes[i] (x1 y1 x2 y2, 0..1), actions[i].

    Lines that are no row have action 0; `bad_rows` counts those of them that are not empty.
    """

    path: Path
    sha256: str
    boxes: np.ndarray
    actions: np.ndarray
    keyframes: Mapping[Keyframe, np.ndarray]
    bad_rows: int


class Place(NamedTuple):
    """What a sample says of itself: its keyframe, the number of that frame, its lines."""

    keyframe: Keyframe
    frame: int
    lines: np.ndarray


@dataclass(frozen=True)
class KeyframeBoxes:
    """Boxes n 4 (shares of the frame), targets n A (bool): which actions each holds, and scores n:
    how sure the person detector was of each; 1 for boxes of the annotations."""

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


_NOBODY = Detected(np.zeros((0, 4)), np.zeros(0))


class BoxSource:
    """Shard and place in it -> the boxes of that keyframe.

    annotations: of the file that the shards were made from. detections: as of `read_detections`.
    truth: whether boxes of the annotations are among them. Errors: `UserError` where the shards
    were made from another file, or an action is above `num_actions`.
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
        self.places(0)  # another file is an error at the start, not in a worker

    def __call__(self, shard: int, member: int) -> KeyframeBoxes:
        place = self.places(shard)[member]
        boxes, targets = self._annotated(place.lines)
        truth = KeyframeBoxes(place.keyframe, place.frame, boxes, targets, np.ones(len(boxes)))
        if self._detections is None:
            return truth
        found = self._detections.get(place.keyframe, _NOBODY)
        matched = self._matched(found.boxes, boxes, targets)
        detected = dataclasses.replace(
            truth, boxes=found.boxes, targets=matched, scores=found.scores
        )
        return _together(truth, detected) if self._truth else detected

    def nothing(self) -> KeyframeBoxes:
        """Stands for the boxes of a keyframe that cannot be read."""
        boxes, targets = np.zeros((0, 4)), np.zeros((0, self._num_actions), dtype=bool)
        return KeyframeBoxes(("", 0), 0, boxes, targets, np.zeros(0))

    @functools.lru_cache(maxsize=_OPEN_SHARDS)  # noqa: B019  lives as long as its reader
    def places(self, shard: int) -> list[Place]:
        """What the samples of a shard say of themselves."""
        path = self._shards.path(shard)
        facts = read_facts(path, self._shards.index(shard).samples)
        return [self._place(path, fact) for fact in facts]

    def _place(self, path: Path, facts: Facts) -> Place:
        said: dict[str, Any] = facts.model_extra or {}
        if not said.get("boxes"):
            raise UserError(
                f"{path}: {facts.video_id} has no boxes; detection needs shards of "
                "arvideo shards --dataset ava."
            )
        if said["boxes"]["sha256"] != self._annotations.sha256:
            raise UserError(
                f"{path} was made from another {said['boxes']['file']} than "
                f"{self._annotations.path}: their contents differ. Give the file that the shards "
                "were made from, or make them again."
            )
        start, stop = said["part"]
        middle = said.get("keyframe_s", (stop - start) / 2)
        frame = min(round(middle * facts.fps), facts.num_frames - 1)
        film = facts.video_id.rpartition("_")[0]
        return Place((film, said["second"]), frame, np.array(said["boxes"]["lines"]) - 1)

    def _annotated(self, lines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of one box and an action each -> boxes with all their actions."""
        boxes, box_of = np.unique(self._annotations.boxes[lines], axis=0, return_inverse=True)
        targets = np.zeros((len(boxes), self._num_actions), dtype=bool)
        targets[box_of.reshape(-1), self._annotations.actions[lines] - 1] = True
        return boxes, targets

    def _matched(self, found: np.ndarray, boxes: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Actions of detected boxes, as `detect.match_iou` says."""
        if not len(boxes) or not len(found):
            return np.zeros((len(found), self._num_actions), dtype=bool)
        best, iou = best_match(found, boxes)
        return targets[best] & (iou >= self._match_iou)[:, None]


def read_annotations(path: str | None, key: str) -> Annotations:
    """An annotations file of AVA; `key` is the setting that names it.

    Errors: `UserError` where there is none, or not one row is right. Wrong rows are counted.
    """
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
    places = {keyframe: np.array(own) for keyframe, own in keyframes.items()}
    return Annotations(Path(path), digest, boxes, actions, places, bad_rows)


def read_detections(path: str, key: str, min_score: float) -> dict[Keyframe, Detected]:
    """Boxes of a person detector with at least `min_score`, by keyframe, best first.

    The CSV that is commonly used for AVA, without header: `_FORMAT`. Boxes are cut off at 0 and 1;
    one that is listed several times (for its actions, say) counts once, with its best score.
    Errors: `UserError` that names the line, and where no box is left.
    """
    found: dict[Keyframe, dict[tuple[float, ...], float]] = defaultdict(dict)
    for number, text in text_lines(Path(path)):
        try:
            keyframe, box, score = _detection(text)
        except ValueError as error:
            raise UserError(f"{key}={path}, line {number}: {error}; expected {_FORMAT}.") from None
        if score >= min_score:
            found[keyframe][box] = max(score, found[keyframe].get(box, 0.0))
    if not found:
        raise UserError(f"{key}={path} has no box with a score of {min_score} or more.")
    return {keyframe: _best_first(boxes) for keyframe, boxes in found.items()}


def read_excluded(path: str | None) -> set[Keyframe]:
    """Keyframes that do not count. Errors: `UserError` that names the line."""
    excluded = set()
    for number, text in text_lines(Path(path)) if path is not None else ():
        try:
            excluded.add(parse_excluded(text))
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}.") from None
    return excluded


def _together(one: KeyframeBoxes, other: KeyframeBoxes) -> KeyframeBoxes:
    """The boxes of both, which are of one keyframe."""
    return dataclasses.replace(
        one,
        boxes=np.concatenate([one.boxes, other.boxes]),
        targets=np.concatenate([one.targets, other.targets]),
        scores=np.concatenate([one.scores, other.scores]),
    )


def _best_first(scores: Mapping[tuple[float, ...], float]) -> Detected:
    boxes = sorted(scores, key=lambda box: -scores[box])
    return Detected(np.array(boxes), np.array([scores[box] for box in boxes]))


def _detection(text: str) -> tuple[Keyframe, tuple[float, ...], float]:
    fields = next(csv.reader([text]))
    if len(fields) not in (7, 8):
        raise ValueError(f"{len(fields)} fields")
    box = tuple(min(1.0, max(0.0, number)) for number in _numbers(fields[2:6]))
    (score,) = _numbers(fields[-1:])
    if not (box[0] < box[2] and box[1] < box[3]):
        raise ValueError(f"box {fields[2:6]} is empty within 0..1")
    return (fields[0], int(fields[1])), box, score


def _numbers(fields: list[str]) -> Iterator[float]:
    for field in fields:
        number = float(field)
        if not np.isfinite(number):
            raise ValueError(f"'{field}' is no finite number")
        yield number
