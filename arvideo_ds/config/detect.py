"""The recipe of detection: which actions happen in boxes around keyframes."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from arvideo_ds.config.settings import Positive, Settings, Share
from arvideo_ds.config.sizes import Transformer
from arvideo_ds.config.transfer import TransferRecipe, TransferSettings
from arvideo_ds.errors import UserError


class DetectSettings(TransferSettings):
    """How the actions in boxes are learnt.

    Runs that were trained before a key existed had what is its default; the official settings of
    the published figure are in recipes/ava, each with its source in docs/detection.md.
    """

    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.2
    # Actions are numbered 1..num_actions; one logit each.
    num_actions: Positive = 80
    # The file of boxes that the shards were made from (ava_train_v2.2.csv).
    annotations: str | None = None
    # "all": boxes of the annotations, and those of `detections` where given. "annotated": boxes of
    # the annotations alone; `detections` is refused.
    train_on: Literal["all", "annotated"] = "all"
    # Boxes of a person detector, which are trained on beside those of the annotations: a CSV of
    # video_id, second, x1, y1, x2, y2, [anything,] score. Those below min_score are ignored.
    detections: str | None = None
    min_score: Share = 0.9
    # A detected box has the actions of the annotated one that it overlaps most, from this IoU on;
    # below, it has none.
    match_iou: Annotated[float, Field(gt=0, le=1)] = 0.5
    # Boxes that the crop does not show: "dropped", or "kept" with their actions, as a line on the
    # edge of the clip that is nearest.
    outside: Literal["dropped", "kept"] = "dropped"
    # How far each side of a training box moves at most, uniformly, as shares of the box: left and
    # right outwards, inwards, then top and bottom outwards, inwards.
    jitter: tuple[Share, Share, Share, Share] = (0.0, 0.0, 0.0, 0.0)
    # Where the norm between encoder and head is: "pooled" normalises what is read of each box and
    # has no final norm in the encoder; "tokens" is the encoder's own pretrained final norm alone.
    norm: Literal["pooled", "tokens"] = "pooled"
    # RoIAlign with cell centres at half a token (torchvision's aligned=True), or without the shift.
    roi_aligned: bool = True


class DetectEvaluationSettings(Settings):
    """What frame mAP is measured on, while training and afterwards."""

    shards: str | None = None
    # The file of boxes that these shards were made from (ava_val_v2.2.csv): the ground truth.
    annotations: str | None = None
    # Detected boxes, as in `detect`; None judges the actions in the boxes of the ground truth.
    detections: str | None = None
    min_score: Share = 0.8
    # Seconds that do not count (ava_val_excluded_timestamps_v2.2.csv).
    excluded: str | None = None
    # Label map of the evaluated actions (.pbtxt); None are AVA's 60.
    action_list: str | None = None
    every_epochs: Annotated[float, Field(gt=0)] = 1.0
    # Crops along the longer side; a box is judged in the one that shows most of it.
    views: Positive = 3
    # Instead of crops the whole frame, its shorter side of so many pixels, filled up to a multiple
    # of the patch. Frames differ in shape, so each goes through the model alone.
    short_side: Positive | None = None
    # Clips per rank and forward pass; 1 where `short_side` is given.
    batch: Positive = 24
    # By what share of its width and height a box grows, half of it at each side, before the model
    # reads it; the box that is judged stays.
    extend: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]] = (0.0, 0.0)
    # A row's score is the probability of the action times the score of the box in `detections`.
    person_score: bool = False
    # Which mAP chooses the best weights: "map" counts the 50 best rows of a keyframe (ActivityNet),
    # "map_uncapped" counts all. Both are reported.
    best_by: Literal["map", "map_uncapped"] = "map"

    @property
    def crops(self) -> int:
        """Clips of a keyframe in a test."""
        return self.views if self.short_side is None else 1

    @property
    def keyframes(self) -> int:
        """Keyframes per rank and forward pass of a test."""
        return self.batch // self.views if self.short_side is None else 1


class DetectRecipe(TransferRecipe):
    """A run that trains a detector of actions in boxes around keyframes."""

    purpose: ClassVar[str] = "detect"
    script: ClassVar[str] = "detect"
    run_name: ClassVar[str] = "a detection run"
    tested_by: ClassVar[str] = "evaluate_detection"

    task: Literal["detect"] = "detect"
    detect: DetectSettings = DetectSettings()
    evaluation: DetectEvaluationSettings = DetectEvaluationSettings()

    @property
    def transformer(self) -> Transformer:
        return Transformer(self.size, self.model.size, outputs=self.detect.num_actions)

    @model_validator(mode="after")
    def _boxes_stay_right(self) -> Self:
        _ = self.geometry
        if self.data.randaugment is not None:
            raise UserError(
                f"data.randaugment={self.data.randaugment} turns and shifts the picture, and boxes "
                "would stay behind. Set data.randaugment: null."
            )
        if self.data.crop == "grid":
            raise UserError(
                "data.crop=grid is for clips without boxes; set data.crop to short_side, "
                "multi_scale or random_resized."
            )
        if self.detect.train_on == "annotated" and self.detect.detections is not None:
            raise UserError(
                f"detect.detections={self.detect.detections} gives boxes to train on, and "
                "detect.train_on=annotated trains on none of them. Leave detect.detections out, or "
                "set detect.train_on=all."
            )
        if self.evaluation.keyframes < 1:
            raise UserError(
                f"evaluation.batch={self.evaluation.batch} is smaller than evaluation.views="
                f"{self.evaluation.views}: the views of a keyframe stay together. Raise it to "
                f"{self.evaluation.views}."
            )
        return self
