"""A detector judged: every keyframe once over all ranks, then frame mAP against the annotations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from arvideo_ds.config import DetectRecipe
from arvideo_ds.data.clips import Skipped
from arvideo_ds.data.detection import DetectionBatch, EvaluationKeyframes, collate_keyframes
from arvideo_ds.data.keyframes import (
    Annotations,
    BoxSource,
    Keyframe,
    read_annotations,
    read_detections,
    read_excluded,
)
from arvideo_ds.data.loader import evaluation_batches, loader_of, worker_count
from arvideo_ds.errors import UserError
from arvideo_ds.evaluation.actions import read_actions
from arvideo_ds.evaluation.detection_map import (
    LEAST_IOU,
    MOST_ROWS,
    Rows,
    judged,
    mean_average_precision,
)
from arvideo_ds.evaluation.pretrained import with_weights
from arvideo_ds.host import available_cores
from arvideo_ds.models.detector import Detector
from arvideo_ds.shards.manifest import ShardSet


@dataclass(frozen=True)
class Scored:
    """Of one keyframe: boxes n 4 (x1 y1 x2 y2, 0..1) and the score of each action, n A.

    A score is the action's probability, times that of the person where `evaluation.person_score`.
    """

    boxes: np.ndarray
    scores: np.ndarray

    def rows(self, actions: np.ndarray) -> Rows:
        """A row for each box and each of these actions (numbered from 1)."""
        scores = self.scores[:, actions - 1]
        return Rows(
            np.repeat(self.boxes, len(actions), axis=0),
            np.tile(actions, len(self.boxes)),
            scores.reshape(-1),
        )


@dataclass(frozen=True)
class Found:
    """What a detector found: keyframes that were seen, and videos that did not decode."""

    scored: Mapping[Keyframe, Scored]
    skipped: list[Skipped]


@dataclass(frozen=True)
class Report:
    """Average precision by action (0..1, NaN without ground truth), their mean, and what counts.

    `precisions` and `mean` count the 50 best rows of a keyframe, as ActivityNet's script does,
    those called uncapped all rows. `missed` are keyframes of the ground truth that the shards lack
    (their boxes count as missed), `unscored` keyframes with detected boxes that they lack (nothing
    of them counts).
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
        """What kept the number from being about all boxes of all keyframes, in words."""
        said = {
            "keyframes of the annotations are not in the shards: their boxes count as missed "
            "(evaluation.excluded names seconds that do not count)": self.missed,
            "keyframes with detected boxes are not in the shards: the official script would count "
            "what a detector says of them as wrong, here nothing of them counts": self.unscored,
            "keyframes did not decode: their boxes count as missed": self.unreadable,
            "rows of the annotations are wrong and count for nothing": self.bad_rows,
        }
        return [f"{count} {what}." for what, count in said.items() if count]


class Judge:
    """The files that `evaluation` of a recipe names, read once; scores a detector against them.

    Errors: `UserError` for files that are missing, wrong, or of other shards.
    """

    def __init__(self, shards: ShardSet, recipe: DetectRecipe) -> None:
        settings = recipe.evaluation
        self.shards, self.recipe = shards, recipe
        self.annotations = read_annotations(settings.annotations, "evaluation.annotations")
        self.actions = _evaluated(recipe)
        self.excluded = read_excluded(settings.excluded)
        self.detections = None
        if settings.detections is not None:
            self.detections = read_detections(
                settings.detections, "evaluation.detections", settings.min_score
            )
        self.boxes = BoxSource(
            shards,
            self.annotations,
            detections=self.detections,
            truth=self.detections is None,
            num_actions=recipe.detect.num_actions,
            match_iou=recipe.detect.match_iou,
        )
        self.truth = ground_truth(self.annotations)

    def find(
        self,
        predict: Callable[[DetectionBatch], Tensor],
        *,
        num_workers: int,
        device: torch.device,
        progress: str | None = None,
    ) -> Found:
        """Score the boxes of all keyframes; every rank calls it and gets the whole. Collective.

        predict: logits R A of a batch. All ranks predict equally often.
        """
        rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        settings = self.recipe.evaluation
        clips = EvaluationKeyframes(self.shards, self.recipe, self.boxes)
        batches = evaluation_batches(len(clips), settings.keyframes)
        mine = batches[rank::size]
        # A rank whose share is shorter predicts the first batch once more, and forgets it.
        dealt = mine + [batches[0]] * (math.ceil(len(batches) / size) - len(mine))
        loader = loader_of(
            clips, self.recipe, dealt, num_workers=num_workers, together=collate_keyframes
        )
        scored: dict[Keyframe, Scored] = {}
        skipped: list[Skipped] = []
        shown = tqdm(loader, desc=progress, unit="batch", disable=progress is None or rank > 0)
        for number, batch in enumerate(shown):
            scores = predict(batch.to(device)).float().sigmoid().cpu().numpy()
            if settings.person_score:
                scores = scores * batch.person_scores.numpy()[:, None]
            if number < len(mine):
                scored.update(_by_keyframe(batch, scores, settings.crops))
                skipped += batch.skipped
        return _together(scored, skipped, len(clips))

    def report(self, found: Found) -> Report:
        """Frame mAP of what was found, with ActivityNet's cap and without."""
        actions = np.array(sorted(self.actions))
        rows = {keyframe: scored.rows(actions) for keyframe, scored in found.scored.items()}
        held = judged(self.truth, rows, self.actions, excluded=self.excluded)
        capped, uncapped = held.average_precisions(MOST_ROWS), held.average_precisions()
        detected = set(self.detections or ()) - self.excluded
        return Report(
            capped,
            mean_average_precision(capped),
            uncapped,
            mean_average_precision(uncapped),
            keyframes=len(found.scored),
            boxes=sum(len(scored.boxes) for scored in found.scored.values()),
            unreadable=len(found.skipped),
            missed=len(self.truth.keys() - self.excluded - found.scored.keys()),
            unscored=len(detected - found.scored.keys()),
            bad_rows=self.annotations.bad_rows,
        )


def evaluate_run(recipe: DetectRecipe, weights: Path) -> tuple[Judge, Found, Report]:
    """Judge the weights of a finished run on the recipe's `evaluation`, in one process.

    Errors: `UserError` for weights that are missing or of another model, and as `Judge`.
    """
    assert recipe.evaluation.shards is not None
    judge = Judge(ShardSet(recipe.evaluation.shards), recipe)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = with_weights(Detector(recipe.encoder, recipe.detect), weights).to(device)

    @torch.inference_mode()
    def predict(batch: DetectionBatch) -> Tensor:
        return model(batch.clips, batch.boxes, batch.clip_of)

    workers = worker_count(recipe, cores=len(available_cores()))
    found = judge.find(predict, num_workers=workers, device=device, progress="keyframes")
    return judge, found, judge.report(found)


def as_json(judge: Judge, report: Report) -> dict[str, Any]:
    """The report as detection.json has it: percentages, null where there is no ground truth."""
    settings = judge.recipe.evaluation
    detected = f"detected, score {settings.min_score} or more"

    def by_name(precisions: Mapping[int, float]) -> dict[str, float | None]:
        return {judge.actions[action]: _percent(value) for action, value in precisions.items()}

    return {
        **{name: _percent(mean) for name, mean in report.means().items()},
        "most_rows_of_map": MOST_ROWS,
        "iou": LEAST_IOU,
        "classes": report.classes,
        "boxes_of": "ground truth" if settings.detections is None else detected,
        "score": "action x person" if settings.person_score else "action",
        "average_precision": by_name(report.precisions),
        "average_precision_uncapped": by_name(report.precisions_uncapped),
        "keyframes": report.keyframes,
        "boxes": report.boxes,
        "notes": report.notes(),
        "manifest": judge.shards.hash,
        "annotations_sha256": judge.annotations.sha256,
    }


def _percent(share: float) -> float | None:
    return None if math.isnan(share) else 100 * share


def ground_truth(annotations: Annotations) -> dict[Keyframe, Rows]:
    """The rows of an annotations file by keyframe."""
    return {
        keyframe: Rows(annotations.boxes[lines], annotations.actions[lines], np.ones(len(lines)))
        for keyframe, lines in annotations.keyframes.items()
    }


def write_official_csv(path: Path, found: Found, actions: Mapping[int, str]) -> None:
    """The detections as the official script reads them, a row for each box and action."""
    numbers = np.array(sorted(actions))
    with path.open("w", encoding="utf-8") as file:
        for (film, second), scored in found.scored.items():
            rows = scored.rows(numbers)
            for box, action, score in zip(rows.boxes, rows.actions, rows.scores, strict=True):
                corners = ",".join(f"{side:.4f}" for side in box)
                file.write(f"{film},{second:04d},{corners},{action},{score:.6f}\n")


def _evaluated(recipe: DetectRecipe) -> dict[int, str]:
    named = recipe.evaluation.action_list
    actions = read_actions(None if named is None else Path(named))
    if max(actions) > recipe.detect.num_actions:
        raise UserError(
            f"{named or 'AVA'} evaluates action {max(actions)}, above detect.num_actions="
            f"{recipe.detect.num_actions}. Give the label map of these actions "
            "(evaluation.action_list)."
        )
    return actions


def _by_keyframe(
    batch: DetectionBatch, scores: np.ndarray, views: int
) -> Iterator[tuple[Keyframe, Scored]]:
    """Each keyframe of a batch that decoded, with its boxes from whichever views."""
    number_of, valid = batch.clip_of.numpy() // views, batch.valid[::views].tolist()
    for number, keyframe in enumerate(batch.keyframes[::views]):
        if valid[number]:
            own = number_of == number
            yield keyframe, Scored(batch.in_frame.numpy()[own], scores[own])


def _together(scored: dict[Keyframe, Scored], skipped: list[Skipped], num_samples: int) -> Found:
    shares: list[Any] = [(scored, skipped)]
    if dist.is_initialized():
        shares = [None] * dist.get_world_size()
        dist.all_gather_object(shares, (scored, skipped))
    merged = {keyframe: own for share, _ in shares for keyframe, own in share.items()}
    left_out = [video for _, share in shares for video in share]
    if len(merged) + len(left_out) != num_samples:
        raise AssertionError(f"{len(merged)} of {num_samples} keyframes were scored")
    return Found(merged, left_out)
