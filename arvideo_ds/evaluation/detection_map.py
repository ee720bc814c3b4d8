"""Frame mAP of action detection, by the rules of AVA's official evaluation.

The official script is TensorFlow's PASCAL evaluator. It takes the detections of a keyframe and
class in order of their scores. Each is compared with the one ground-truth box it overlaps most; it
is right if that IoU is at least 0.5 and no earlier detection matched the box. Average precision is
the whole area under the curve after precision was made monotone (no 11 points). The mean is over
evaluated classes that have ground truth. Excluded keyframes do not count.

ActivityNet's script counts the 50 best rows of a keyframe, the script behind VideoMAE's and
SlowFast's figures all; the two figures are not comparable.

torchmetrics and pycocotools compute COCO's measure instead, which samples precision at 101 recalls
and lets a detection whose best box is taken match its second best. Equal scores keep the order of
the input; the official script's sort is unstable.
"""

from __future__ import annotations

from collections import Counter
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
class ActionRows:
    """A row for each box and action of one keyframe: boxes R 4 (x1 y1 x2 y2), actions R, scores R.

    Ground truth has scores of 1.
    """

    boxes: np.ndarray
    actions: np.ndarray
    scores: np.ndarray

    def pick(self, which: np.ndarray) -> ActionRows:
        return ActionRows(self.boxes[which], self.actions[which], self.scores[which])


@dataclass(frozen=True)
class MatchedRows:
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

        most_rows: the best rows of a keyframe that count; None = all. Excluded rows come after all
        that count, so they matched no box of theirs.
        """
        counts = np.ones(len(self.ranks), bool) if most_rows is None else self.ranks < most_rows
        actions, scores, right = self.actions[counts], self.scores[counts], self.right[counts]
        return {
            action: average_precision(scores[actions == action], right[actions == action], count)
            for action, count in self.num_truth.items()
        }


def match_rows(
    truth: Mapping[Keyframe, ActionRows],
    detected: Mapping[Keyframe, ActionRows],
    actions: Collection[int],
    *,
    excluded: Collection[Keyframe] = (),
) -> MatchedRows:
    """Match detections with the ground truth of the evaluated actions, once for every cap.

    Rows of other actions do not count. In keyframes without ground truth all detections are wrong.
    Source: ActivityNet's Evaluation/get_ava_performance.py.
    """
    evaluated = sorted(actions)
    truth, detected = (
        {
            keyframe: rows.pick(np.isin(rows.actions, evaluated))
            for keyframe, rows in table.items()
            if keyframe not in excluded
        }
        for table in (truth, detected)
    )
    num_truth = Counter(action for rows in truth.values() for action in rows.actions.tolist())
    parts = [_match(rows, truth.get(keyframe)) for keyframe, rows in detected.items()]
    parts.append((np.zeros(0, int), np.zeros(0), np.zeros(0, bool), np.zeros(0, int)))
    numbers, scores, right, ranks = map(np.concatenate, zip(*parts, strict=True))
    by_action = {action: num_truth[action] for action in evaluated}
    return MatchedRows(numbers, scores, right, ranks, by_action)


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


def _match(
    rows: ActionRows, truth: ActionRows | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Actions, scores, whether right, and ranks of a keyframe's rows, the best score first."""
    order = np.argsort(-rows.scores, kind="stable")
    has_area = np.asarray((rows.boxes[:, :2] < rows.boxes[:, 2:]).all(axis=1))[order]
    # A box without an area is no detection, but counts for the ranks.
    ranks = np.flatnonzero(has_area)
    rows = rows.pick(order[ranks])
    right = np.zeros(len(rows.scores), dtype=bool)
    if truth is not None and len(truth.actions) and len(right):
        same_action = rows.actions[:, None] == truth.actions
        pair = (torch.as_tensor(b, dtype=torch.float64) for b in (rows.boxes, truth.boxes))
        overlaps = np.where(same_action, box_iou(*pair).numpy(), -1.0)
        nearest = overlaps.argmax(axis=1)
        hits = np.flatnonzero(overlaps.max(axis=1) >= LEAST_IOU)
        # Each ground-truth box is matched by the first row that hits it, the one of best score.
        _, first = np.unique(nearest[hits], return_index=True)
        right[hits[first]] = True
    return rows.actions, rows.scores, right, ranks
