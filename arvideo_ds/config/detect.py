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

    Defaults reproduce runs of earlier versions; the official settings of the published figure are
    in recipes/ava, each with its source in docs/detection.md.
    """

    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Stochastic depth: share of the last block's branches that are skipped."""
    num_actions: Positive = 80
    """Actions are numbered 1..num_actions; one logit each."""
    annotations: str | None = None
    """The file of boxes that the shards were made from (ava_train_v2.2.csv)."""
    train_on: Literal["all", "annotated"] = "all"
    """all: annotated boxes and `detections`, if given. annotated: only annotated boxes."""
    detections: str | None = None
    """Boxes of a person detector for training, a CSV of video_id, second, x1, y1, x2, y2,
    [anything,] score."""
    min_score: Share = 0.9
    """Smallest score of a box of `detections` to train on."""
    match_iou: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Smallest IoU at which a detected box gets the actions of the closest annotated box."""
    outside: Literal["dropped", "kept"] = "dropped"
    """Boxes outside the crop: dropped, or kept with their actions as a line on the nearest edge."""
    jitter: tuple[Share, Share, Share, Share] = (0.0, 0.0, 0.0, 0.0)
    """Largest uniform shift of each side of a training box, as shares of the box: left and right
    outwards, inwards, then top and bottom outwards, inwards."""
    norm: Literal["pooled", "tokens"] = "pooled"
    """Norm between encoder and head: of each box's pooled feature, without a final norm in the
    encoder (pooled); or the encoder's pretrained final norm alone (tokens)."""
    roi_aligned: bool = True
    """RoIAlign with cell centres at half a token (torchvision's aligned=True), or without shift."""


class DetectEvaluationSettings(Settings):
    """What frame mAP is measured on, while training and afterwards."""

    shards: str | None = None
    """Folder of the keyframes' shards to test on; null: only training."""
    annotations: str | None = None
    """The file of boxes that these shards were made from (ava_val_v2.2.csv): the ground truth."""
    detections: str | None = None
    """Detected boxes, as in `detect`; null evaluates actions in the boxes of the ground truth."""
    min_score: Share = 0.8
    """Smallest score of a box of `detections` to test on."""
    excluded: str | None = None
    """Seconds that are not evaluated (ava_val_excluded_timestamps_v2.2.csv)."""
    action_list: str | None = None
    """Label map of the evaluated actions (.pbtxt); null: AVA's 60."""
    every_epochs: Annotated[float, Field(gt=0)] = 1.0
    """Epochs between tests while training; the best weights are kept."""
    views: Positive = 3
    """Crops along the longer side; a box is evaluated in the crop that shows most of it."""
    short_side: Positive | None = None
    """Replaces the crops by the whole frame, with this shorter side in pixels, padded to a multiple
    of the patch. Frames differ in shape, so the batch is one clip."""
    batch: Positive = 24
    """Clips per rank and forward pass; 1 with `short_side`."""
    extend: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]] = (0.0, 0.0)
    """Share of width and height by which the model's input box grows, half at each side."""
    person_score: bool = False
    """Multiplies the probability of the action by the score of the box in `detections`."""
    best_by: Literal["map", "map_uncapped"] = "map"
    """The mAP that chooses the best weights: of the 50 best rows of a keyframe (ActivityNet's map)
    or of all (map_uncapped). Both are reported."""

    @property
    def crops(self) -> int:
        """Clips per keyframe in a test."""
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
        _ = self.geometry  # checks that the patch divides the clip
        if self.data.randaugment is not None:
            raise UserError(
                f"data.randaugment={self.data.randaugment} moves the picture, but not its boxes. "
                "Set data.randaugment: null."
            )
        if self.data.segments:
            raise UserError("data.segments=true has no effect on clips of keyframes; remove it.")
        if self.data.planes:
            raise UserError("data.planes=true does not support boxes; remove data.planes.")
        if self.data.crop == "grid":
            raise UserError(
                "data.crop=grid does not support boxes; set data.crop to short_side, multi_scale "
                "or random_resized."
            )
        if self.detect.train_on == "annotated" and self.detect.detections is not None:
            raise UserError(
                "detect.train_on=annotated does not train on the boxes of detect.detections="
                f"{self.detect.detections}. Remove detect.detections, or set detect.train_on=all."
            )
        if self.evaluation.keyframes < 1:
            raise UserError(
                f"evaluation.batch={self.evaluation.batch} is smaller than evaluation.views: the "
                f"views of a keyframe stay together. Raise it to {self.evaluation.views}."
            )
        return self
