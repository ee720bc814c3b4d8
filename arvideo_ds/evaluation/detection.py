"""Evaluation of a detector: every keyframe once over all ranks, then frame mAP."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arvideo_ds.config import DetectRecipe
from arvideo_ds.data.clips import Skipped
from arvideo_ds.data.detection import DetectionBatch, EvaluationKeyframes, collate_keyframes
from arvideo_ds.data.keyframes import (
    BoxSource,
    Keyframe,
    read_annotations,
    read_detections,
    read_excluded,
)
from arvideo_ds.data.loader import evaluation_batches, loader_of, worker_count
from arvideo_ds.errors import UserError
from arvideo_ds.evaluation.detection_map import (
    LEAST_IOU,
    MOST_ROWS,
    ActionRows,
    match_rows,
    mean_average_precision,
)
from arvideo_ds.evaluation.pretrained import with_weights
from arvideo_ds.evaluation.scores import over_ranks
from arvideo_ds.host import available_cores
from arvideo_ds.models.detector import Detector
from arvideo_ds.shards.manifest import ShardSet

AVA_ACTIONS = Path(__file__).with_name("ava_actions.pbtxt")
_ACTION_NAME = re.compile(r'\bname:\s*"([^"]*)"')
_ACTION_NUMBER = re.compile(r"\b(?:label_)?id:\s*(\d+)")


@dataclass(frozen=True)
class ScoredBoxes:
    """Boxes n 4 of one keyframe (x1 y1 x2 y2, 0..1) and the score of each action, n A.

    A score is the action's probability, times that of the person where `evaluation.person_score`.
    """

    boxes: np.ndarray
    scores: np.ndarray

    def rows(self, actions: np.ndarray) -> ActionRows:
        """A row for each box and each of these actions (numbered from 1)."""
        scores = self.scores[:, actions - 1]
        return ActionRows(
            np.repeat(self.boxes, len(actions), axis=0),
            np.tile(actions, len(self.boxes)),
            scores.reshape(-1),
        )


@dataclass(frozen=True)
class Detections:
    """Scored boxes of the keyframes that decoded, and the videos that did not."""

    by_keyframe: Mapping[Keyframe, ScoredBoxes]
    skipped: list[Skipped]


@dataclass(frozen=True)
class DetectionReport:
    """Average precision by action (0..1, NaN without ground truth), their mean, and counts.

    `precisions` and `mean` count the 50 best rows of a keyframe, as ActivityNet's script does,
    the uncapped ones all rows. missed: keyframes of the ground truth that were not scored; their
    boxes count as missed. unscored: keyframes with detected boxes that the shards lack; their boxes
    do not count.
    """

    precisions: dict[int, float]
    mean: float
    precisions_uncapped: dict[int, float]
    mean_uncapped: float
    keyframes: int
    boxes: int
    unreadable: int
    missed: int
    unscored: int
    bad_rows: int

    def means(self) -> dict[str, float]:
        """Both means, 0..1, by the names that `evaluation.best_by` knows."""
        return {"map": self.mean, "map_uncapped": self.mean_uncapped}

    @property
    def classes(self) -> int:
        """Evaluated actions that have ground truth."""
        return sum(not math.isnan(value) for value in self.precisions.values())

    def notes(self) -> list[str]:
        """Sentences about the boxes and keyframes that the figures do not cover."""
        counts = {
            "keyframes of the annotations are not in the shards: their boxes count as missed "
            "(evaluation.excluded names seconds that do not count)": self.missed,
            "keyframes with detected boxes are not in the shards: the official script would count "
            "detections there as wrong, here they do not count": self.unscored,
            "keyframes did not decode: their boxes count as missed": self.unreadable,
            "rows of the annotations are wrong and do not count": self.bad_rows,
        }
        return [f"{count} {what}." for what, count in counts.items() if count]


class DetectionEvaluator:
    """Scores detectors against the files that `evaluation` of a recipe names, which it reads once.

    Errors: `UserError` for files that are missing, wrong, or of other shards.
    """

    def __init__(self, shards: ShardSet, recipe: DetectRecipe) -> None:
        settings = recipe.evaluation
        self.shards, self.recipe = shards, recipe
        self.annotations = read_annotations(settings.annotations, "evaluation.annotations")
        self.actions = _evaluated_actions(recipe)
        self.excluded = read_excluded(settings.excluded)
        self.persons = None
        if settings.detections is not None:
            self.persons = read_detections(
                settings.detections, "evaluation.detections", settings.min_score
            )
        self.boxes = BoxSource(
            shards,
            self.annotations,
            detections=self.persons,
            truth=self.persons is None,
            num_actions=recipe.detect.num_actions,
            match_iou=recipe.detect.match_iou,
        )
        boxes, actions = self.annotations.boxes, self.annotations.actions
        self.truth = {
            keyframe: ActionRows(boxes[lines], actions[lines], np.ones(len(lines)))
            for keyframe, lines in self.annotations.keyframes.items()
        }

    def detect(
        self,
        predict: Callable[[DetectionBatch], Tensor],
        *,
        num_workers: int,
        device: torch.device,
        progress: str | None = None,
    ) -> Detections:
        """Score the boxes of all keyframes; every rank calls it and gets all. Collective.

        predict: logits R A of a batch. All ranks predict equally often.
        """
        settings = self.recipe.evaluation
        keyframes = EvaluationKeyframes(self.shards, self.recipe, self.boxes)

        def score(batch: Any) -> dict[Keyframe, ScoredBoxes]:
            scores = predict(batch.to(device)).float().sigmoid().cpu().numpy()
            if settings.person_score:
                scores = scores * batch.person_scores.numpy()[:, None]
            return _by_keyframe(batch, scores, settings.crops)

        load = partial(
            loader_of, keyframes, self.recipe, num_workers=num_workers, together=collate_keyframes
        )
        batches = evaluation_batches(len(keyframes), settings.keyframes)
        by_keyframe, skipped = over_ranks(batches, load, score, progress=progress)
        if len(by_keyframe) + len(skipped) != len(keyframes):
            raise AssertionError(f"{len(by_keyframe)} of {len(keyframes)} keyframes were scored")
        return Detections(by_keyframe, skipped)

    def report(self, detections: Detections) -> DetectionReport:
        """Frame mAP of the detections, with ActivityNet's cap and without."""
        actions, scored = np.array(sorted(self.actions)), detections.by_keyframe
        rows = {keyframe: boxes.rows(actions) for keyframe, boxes in scored.items()}
        matched = match_rows(self.truth, rows, self.actions, excluded=self.excluded)
        capped, uncapped = matched.average_precisions(MOST_ROWS), matched.average_precisions()
        return DetectionReport(
            capped,
            mean_average_precision(capped),
            uncapped,
            mean_average_precision(uncapped),
            keyframes=len(scored),
            boxes=sum(len(boxes.boxes) for boxes in scored.values()),
            unreadable=len(detections.skipped),
            missed=len(self.truth.keys() - self.excluded - scored.keys()),
            unscored=len(set(self.persons or ()) - self.excluded - scored.keys()),
            bad_rows=self.annotations.bad_rows,
        )


def evaluate_run(
    recipe: DetectRecipe, weights: Path
) -> tuple[DetectionEvaluator, Detections, DetectionReport]:
    """Evaluate the weights of a finished run on the recipe's `evaluation`, in one process.

    Errors: `UserError` for weights that are missing or of another model, and as
    `DetectionEvaluator`.
    """
    assert recipe.evaluation.shards is not None
    evaluator = DetectionEvaluator(ShardSet(recipe.evaluation.shards), recipe)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = with_weights(Detector(recipe.encoder, recipe.detect), weights).to(device)

    @torch.inference_mode()
    def predict(batch: DetectionBatch) -> Tensor:
        return model(batch.clips, batch.boxes, batch.clip_of)

    workers = worker_count(recipe, cores=len(available_cores()))
    detections = evaluator.detect(predict, num_workers=workers, device=device, progress="keyframes")
    return evaluator, detections, evaluator.report(detections)


def as_json(evaluator: DetectionEvaluator, report: DetectionReport) -> dict[str, Any]:
    """The report for detection.json: percentages, null where there is no ground truth."""
    settings = evaluator.recipe.evaluation
    detected = f"detected, score {settings.min_score} or more"

    def percent(precisions: Mapping[Any, float]) -> dict[str, float | None]:
        return {
            evaluator.actions.get(key, key): None if math.isnan(share) else 100 * share
            for key, share in precisions.items()
        }

    return {
        **percent(report.means()),
        "most_rows_of_map": MOST_ROWS,
        "iou": LEAST_IOU,
        "classes": report.classes,
        "boxes_of": "ground truth" if settings.detections is None else detected,
        "score": "action x person" if settings.person_score else "action",
        "average_precision": percent(report.precisions),
        "average_precision_uncapped": percent(report.precisions_uncapped),
        "keyframes": report.keyframes,
        "boxes": report.boxes,
        "notes": report.notes(),
        "manifest": evaluator.shards.hash,
        "annotations_sha256": evaluator.annotations.sha256,
    }


def write_official_csv(path: Path, detections: Detections, actions: Mapping[int, str]) -> None:
    """Write the detections in the official script's format, a row for each box and action."""
    numbers = np.array(sorted(actions))
    with path.open("w", encoding="utf-8") as file:
        for (film, second), scored in detections.by_keyframe.items():
            rows = scored.rows(numbers)
            for box, action, score in zip(rows.boxes, rows.actions, rows.scores, strict=True):
                corners = ",".join(f"{side:.4f}" for side in box)
                file.write(f"{film},{second:04d},{corners},{action},{score:.6f}\n")


def read_actions(path: Path) -> dict[int, str]:
    """Number -> name of the actions in a label map (.pbtxt).

    Errors: `UserError` where the file cannot be read, or an item lacks its name or number.
    """
    try:
        items = path.read_text(encoding="utf-8").split("{")[1:]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the action list {path}: {error}.") from None
    pairs = [(_ACTION_NUMBER.search(item), _ACTION_NAME.search(item)) for item in items]
    actions = {int(number[1]): name[1] for number, name in pairs if number and name}
    if not actions or len(actions) != len(items):
        raise UserError(
            f"the action list {path} has {len(items)} items, {len(actions)} of them with a name "
            "and a number of their own. Give a label map such as "
            "ava_action_list_v2.2_for_activitynet_2019.pbtxt."
        )
    return actions


def _evaluated_actions(recipe: DetectRecipe) -> dict[int, str]:
    path = recipe.evaluation.action_list
    actions = read_actions(AVA_ACTIONS if path is None else Path(path))
    if max(actions) > recipe.detect.num_actions:
        raise UserError(
            f"{path or 'AVA'} evaluates action {max(actions)}, above detect.num_actions="
            f"{recipe.detect.num_actions}. Give the label map of these actions "
            "(evaluation.action_list)."
        )
    return actions


def _by_keyframe(
    batch: DetectionBatch, scores: np.ndarray, views: int
) -> dict[Keyframe, ScoredBoxes]:
    """Each keyframe of a batch that decoded, with its boxes from all views."""
    number_of, in_frame = batch.clip_of.numpy() // views, batch.in_frame.numpy()
    valid = zip(batch.keyframes[::views], batch.valid[::views].tolist(), strict=True)
    return {
        keyframe: ScoredBoxes(in_frame[number_of == number], scores[number_of == number])
        for number, (keyframe, decoded) in enumerate(valid)
        if decoded
    }
