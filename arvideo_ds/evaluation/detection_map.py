"""Frame mAP of action detection, by the rules of AVA's official evaluation.

The official script is TensorFlow's PASCAL evaluator. Of each keyframe and class: detections in
order of their scores; each looks at the one ground-truth box it overlaps most, and is right if that
IoU is at least 0.5 and nobody was right about the box before. Average precision is the whole area
under the curve after precision was made monotone (no 11 points). The mean is over evaluated classes
that have ground truth. Excluded keyframes do not count.

ActivityNet's script counts the 50 best rows of a keyframe; the script with which VideoMAE's and
SlowFast's figures were made counts all. Of 60 actions 50 rows are less than one box, so with many
persons the cap costs points; a figure of one is not one of the other.

No library is used, since none is exact: torchmetrics and pycocotools compute COCO's measure, which
samples precision at 101 recalls, and lets a detection whose best box is taken have its second best
(on small random sets they were up to 0.9 points off).
The official script leaves the order of equal scores to an unstable sort; here it is the input's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torchvision.ops import box_iou

from arvideo_ds.data.keyframes import Keyframe

LEAST_IOU = 0.5
# ActivityNet's cap on the rows of a keyframe.
MOST_ROWS = 50


@dataclass(frozen=True)
class Rows:
    """Of one keyframe, a row for each box and action: boxes R 4 (x1 y1 x2 y2), actions R, scores R.

    Ground truth has scores of 1.
    """

    boxes: np.ndarray
    actions: np.ndarray
    scores: np.ndarray

    def pick(self, which: np.ndarray) -> Rows:
        return Rows(self.boxes[which], self.actions[which], self.scores[which])


@dataclass(frozen=True)
class Judged:
    """Rows of all keyframes, which of them are right, and the ground truth of each action.

    actions, scores: R. right: R (bool). ranks: R, the place of each row among those of its
    keyframe, the best score first, from 0. num_truth: boxes by evaluated action.
    """

    actions: np.ndarray
    scores: np.ndarray
    right: np.ndarray
    ranks: np.ndarray
    num_truth: Mapping[int, int]

    def average_precisions(self, most_rows: int | None = None) -> dict[int, float]:
        """Average precision, 0..1, of each evaluated action; NaN where it has no ground truth.

        most_rows: rows of a keyframe that count, the best ones; None = all. A row that does not
        count has taken no box from one that does, as all of those are before it.
        """
        counts = np.ones(len(self.ranks), bool) if most_rows is None else self.ranks < most_rows
        actions, scores, right = self.actions[counts], self.scores[counts], self.right[counts]
        return {
            action: average_precision(scores[actions == action], right[actions == action], count)
            for action, count in self.num_truth.items()
        }


def judged(
    truth: Mapping[Keyframe, Rows],
    found: Mapping[Keyframe, Rows],
    actions: Collection[int],
    *,
    excluded: Collection[Keyframe] = (),
) -> Judged:
    """What was found held against the ground truth of the evaluated actions, once for every cap.

    Rows of other actions are left aside. Keyframes without ground truth hold false detections
    alone. Source: ActivityNet's Evaluation/get_ava_performance.py.
    """
    evaluated = np.array(sorted(actions))
    num_truth = dict.fromkeys(evaluated.tolist(), 0)
    for keyframe, rows in truth.items():
        if keyframe not in excluded:
            for action in rows.actions[np.isin(rows.actions, evaluated)].tolist():
                num_truth[action] += 1
    parts = [
        _judged(rows.pick(np.isin(rows.actions, evaluated)), truth.get(keyframe))
        for keyframe, rows in found.items()
        if keyframe not in excluded
    ]
    columns = zip(*parts, strict=True) if parts else ([np.zeros(0)] for _ in range(4))
    of, scores, right, ranks = (np.concatenate(list(column)) for column in columns)
    return Judged(of, scores, right > 0, ranks, num_truth)


def mean_average_precision(precisions: Mapping[int, float]) -> float:
    """The mean over the classes that have ground truth; NaN where none has."""
    known = [value for value in precisions.values() if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def average_precision(scores: np.ndarray, right: np.ndarray, num_truth: int) -> float:
    """Area under the monotone curve of precision over recall: scores R, right R (bool)."""
    if not num_truth:
        return float("nan")
    right = right[np.argsort(-scores, kind="stable")]
    precision = np.cumsum(right) / np.arange(1, len(right) + 1)
    monotone = np.maximum.accumulate(precision[::-1])[::-1]
    # Recall grows by one part of the ground truth wherever a detection is right.
    return float(monotone[right].sum() / num_truth)


def _judged(
    found: Rows, truth: Rows | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Actions, scores, whether right, and ranks of a keyframe's rows, the best score first."""
    order = np.argsort(-found.scores, kind="stable")
    whole = np.asarray((found.boxes[:, :2] < found.boxes[:, 2:]).all(axis=1))[order]
    # A box without an area is no detection, but has taken its place.
    ranks = np.flatnonzero(whole)
    found = found.pick(order[ranks])
    right = np.zeros(len(found.scores), dtype=bool)
    if truth is not None and len(truth.actions) and len(right):
        overlaps = np.where(
            found.actions[:, None] == truth.actions, _iou(found.boxes, truth.boxes), -1.0
        )
        nearest = overlaps.argmax(axis=1)
        hits = np.flatnonzero(overlaps.max(axis=1) >= LEAST_IOU)
        # Of the rows that hit one ground-truth box, the first, whose score is best.
        _, first = np.unique(nearest[hits], return_index=True)
        right[hits[first]] = True
    return found.actions, found.scores, right, ranks


def _iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    pair = (torch.as_tensor(b, dtype=torch.float64).reshape(-1, 4) for b in (boxes, others))
    return np.asarray(box_iou(*pair))
