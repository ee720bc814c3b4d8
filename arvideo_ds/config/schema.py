"""What a recipe may say, and every default, once.

Of the objective they stand in objectives.py, of the tokenizer in tokenizer.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from arvideo_ds.config.objectives import (
    ArvideoSettings,
    DecoderSettings,
    ObjectiveSettings,
    TokenCounts,
)
from arvideo_ds.config.settings import NonNegative, Positive, PositiveTriple, Settings, Share
from arvideo_ds.config.sizes import BACKBONES, TUBELET, DecoderShape, EncoderSpec, Size
from arvideo_ds.config.tokenizer import (
    CubeSettings,
    TokenizerEvaluationSettings,
    TokenizerSettings,
)
from arvideo_ds.errors import UserError
from arvideo_ds.geometry import Geometry, Triple, num_kept


class ModelSettings(Settings):
    # The encoder's architecture (docs/extending.md adds one).
    name: str = "vit"
    size: str
    # Frames, rows and columns of one token; from the size table when left out.
    patch: PositiveTriple | None = None
    # "sincos_1d" is VideoMAE's table; "sincos_3d" keeps time, row and column apart.
    positions: Literal["sincos_1d", "sincos_3d"] = "sincos_1d"

    @model_validator(mode="after")
    def _size_of_backbone(self) -> Self:
        sizes = BACKBONES.choose(self.name, key="model.name")
        if self.size not in sizes:
            raise UserError(
                f"model.size={self.size!r}: model.name={self.name} has the sizes "
                f"{', '.join(sizes)}."
            )
        return self


class DataSettings(Settings):
    # Folder with manifest.json, as written by data_tools/make_shards.py.
    shards: str | None = None
    # Videos that the plan counts with until the shards are there (a published count).
    num_videos: Positive | None = None
    frames: Positive = 16
    size: tuple[Positive, Positive] = (224, 224)
    stride: Positive = 4
    # "dense": frames with a stride from a random start. "uniform": one frame of each segment.
    sampling: Literal["dense", "uniform"] = "dense"
    # "multi_scale": sides are shares of the largest crop, `crop_scales`; height and width may
    # differ by one step. "random_resized": a share of the area within `crop_area`, 3:4 to 4:3.
    # "grid": the short side as the clip's, then a box at a multiple of the patch (data.scores).
    # "short_side": the short side as `short_side` says, then a box of the clip's size, uniform.
    crop: Literal["multi_scale", "random_resized", "grid", "short_side"] = "multi_scale"
    crop_scales: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (1.0, 0.875, 0.75, 0.66)
    crop_area: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] = (
        0.08,
        1.0,
    )
    # Pixels of the frame's shorter side from which crop=short_side cuts its box.
    short_side: Positive = 256
    flip: bool = False
    # Folder of token scores of these shards (scripts/score_tokens.py), delivered with the clips.
    scores: str | None = None
    # timm's RandAugment, such as "rand-m7-n4-mstd0.5-inc1", alike on all frames of a clip.
    randaugment: str | None = None
    # Largest shift of hue (degrees), saturation and value (0..1), drawn uniformly for a whole clip.
    hsv_jitter: tuple[Annotated[float, Field(ge=0, le=180)], Share, Share] | None = None
    # Probability that a box of the clip is replaced by noise (random erasing).
    erase: Share = 0.0
    # Clips cut from each decoded video (repeated augmentation, VideoMAE V2).
    repeats: Positive = 1
    decoder: Literal["auto", "torchcodec", "decord", "pyav"] = "auto"
    workers: NonNegative | Literal["auto"] = "auto"
    # Batches ahead of the trainer for each worker, within so many MiB over all workers of a rank.
    prefetch: Positive = 2
    prefetch_mib: Positive = 4096
    # The order of samples is cut into this many streams; the number of ranks must divide it.
    num_streams: Positive = 48
    # Samples are shuffled within windows of so many shards.
    window_shards: Positive = 4
    # Above this share of undecodable samples the run stops.
    max_skipped_share: Share = 0.01
    # A batch that has not come after so long means a hung decoder.
    timeout_s: Positive = 300

    @field_validator("size", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int | str) else value

    @field_validator("crop_scales")
    @classmethod
    def _some_scales(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value:
            raise ValueError("needs at least one scale; [1.0] is the plain crop")
        return value

    @model_validator(mode="after")
    def _box_fits(self) -> Self:
        if self.crop == "short_side" and self.short_side < max(self.size):
            raise UserError(
                f"data.short_side={self.short_side} is smaller than data.size={list(self.size)}, "
                f"so no such box fits into the frame. Raise it to {max(self.size)} or more."
            )
        return self

    @model_validator(mode="after")
    def _scores_are_replayed(self) -> Self:
        """Stored scores can follow a clip only where its tokens are tokens of the whole video."""
        needed = {"crop": "grid", "sampling": "dense", "flip": False}
        needed |= {"randaugment": None, "hsv_jitter": None, "erase": 0.0}
        wrong = [key for key, value in needed.items() if getattr(self, key) != value]
        if self.scores is not None and wrong:
            said = ", ".join(f"data.{key}={json.dumps(getattr(self, key))}" for key in wrong)
            remedy = ", ".join(f"data.{key}={json.dumps(needed[key])}" for key in wrong)
            raise UserError(
                f"data.scores={self.scores} needs clips whose tokens are tokens of the whole "
                f"video, and {said} changes them. Set {remedy}, or leave data.scores out."
            )
        return self


class OptimSettings(Settings):
    # Learning rates are given for 256 videos per step and scale linearly: the peak of a run is
    # base_lr x V / 256, it warms up from warmup_lr x V / 256 and ends at min_lr x V / 256, where
    # V = train.total_batch / data.repeats. This is the convention of the official VideoMAE and
    # VideoMAE V2 scripts; several clips of one video count once.
    base_lr: Annotated[float, Field(gt=0)] = 1.5e-4
    warmup_lr: Annotated[float, Field(ge=0)] = 1e-6
    min_lr: Annotated[float, Field(ge=0)] = 1e-5
    warmup_epochs: Annotated[float, Field(ge=0)] = 40
    # Instead of warmup_epochs, for runs whose length is given in steps.
    warmup_steps: NonNegative | None = None
    betas: tuple[Share, Share] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    # Largest norm of the gradient; 0 does not clip.
    clip: Annotated[float, Field(ge=0)] = 0.0
    # The same AdamW from torch (fused), or from DeepSpeed: FusedAdam, and CPUAdam where the
    # optimiser is offloaded. DeepSpeed's are compiled at first use.
    implementation: Literal["torch", "deepspeed"] = "torch"


class TrainSettings(Settings):
    epochs: Positive | None = None
    # Length of the run in optimiser steps, schedule included; where given, epochs do not count.
    max_steps: Positive | None = None
    # Clips per optimiser step over all ranks, repeats counted.
    total_batch: Positive
    # Upper limit of clips per rank and forward pass: memory, not mathematics. The plan takes the
    # largest number up to it that divides the rank's share and accumulates the rest.
    micro_batch: Positive
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    # torch.compile of each transformer layer; the first step takes minutes longer.
    compile: bool = False
    seed: NonNegative = 0
    log_every: Positive = 10
    # Steps between checkpoints; one is always written at the end and when interrupted.
    save_every: Positive = 500
    keep_checkpoints: Positive = 2
    # Steps in a row that may be refused because loss or gradient was not finite.
    max_refused_steps: Positive = 20
    # Without any progress for so long, the stacks of all ranks are written and the late one named.
    # Below the half hour after which a collective gives up.
    stall_s: Annotated[int, Field(ge=1, le=1500)] = 600


class TransferSettings(Settings):
    """How a pretrained encoder is taken over and trained on; defaults of VideoMAE for ViT-B."""

    # Weights to begin with: a run folder, an exported encoder, a public checkpoint (--init-from).
    # None trains from scratch.
    init_from: str | None = None
    # Table of positions: "recomputed" for the clip's own token grid, or "interpolated" from that of
    # the clips that the encoder was pretrained on (models/positions.py). None = interpolated where
    # those are known and have another grid; a run's own recipe.yaml says which it became.
    positions: Literal["recomputed", "interpolated"] | None = None
    # Frames, height and width of those clips; read from --init-from where it says so.
    pretrained_clip: PositiveTriple | None = None
    # The learning rate of layer i of n is that of the head x layer_decay^(n + 1 - i).
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.75
    # Stochastic depth: share of the last block's branches that are left out.
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.1
    # Moving average of the weights, saved beside them; such as 0.9999.
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None


class FinetuneSettings(TransferSettings):
    """How a classifier is trained on labels; defaults of VideoMAE for ViT-B on Kinetics-400."""

    # Classes that the plan counts with until the shards are there.
    num_classes: Positive | None = None
    # Label sets of the shards that are learnt together, such as [verb, noun]: a linear layer each,
    # the loss is their sum. None = the one label of each sample.
    heads: tuple[str, ...] | None = None
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    # Dropout between the pooled, normalised feature and the linear layer while training. VideoMAE's
    # --fc_drop_rate (0.5 for ViT-H on Kinetics-400 and ViT-B on UCF101), V2's --head_drop_rate.
    head_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    # Clips of a micro-batch are mixed in pairs; the share is drawn from Beta(a, a), 0 = never.
    # With both, each micro-batch takes one of them.
    mixup: Annotated[float, Field(ge=0)] = 0.8
    cutmix: Annotated[float, Field(ge=0)] = 1.0
    # Share of the places of the picture that are left out at all times while training (random
    # tubes); a test sees all tokens.
    drop_tokens: Annotated[float, Field(ge=0, lt=1)] = 0.0
    # What is classified: the mean of the tokens, or what one class-attention layer reads of them.
    pooling: Literal["mean", "attention"] = "mean"

    @property
    def mixes(self) -> bool:
        """Whether clips are mixed in pairs."""
        return bool(self.mixup or self.cutmix)

    @field_validator("heads", mode="before")
    @classmethod
    def _a_list(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError("must be a list of label sets, such as [verb, noun]")
        return value


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
    # video_id, second, x1, y1, x2, y2, [anything,] score. Those below min_score are left out.
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


class EvaluationSettings(Settings):
    """Labelled shards that a fine-tuned model is judged on while training and afterwards."""

    shards: str | None = None
    # Epochs between validations (one view a video); the best weights so far are kept.
    every_epochs: Annotated[float, Field(gt=0)] = 1.0
    # Temporal x spatial views of the test after training.
    views: tuple[Positive, Positive] = (2, 3)
    # Clips per rank and forward pass; a video's views stay together.
    batch: Positive = 48


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


class ProbeSettings(Settings):
    """Labelled shards on which scripts/probe.py judges the frozen encoder, and by what.

    features: how the tokens of a clip become one vector, a name in evaluation/probes.py `POOLINGS`:
    `mean` of all tokens, or their `change`: the mean of the later half of the times less the mean
    of the earlier half, which drops what does not move; or their `course`: the means of 8 spans of
    the times side by side, less the mean of all. clips: so many, spread over the video, of which
    the mean counts; the central one where it is 1.
    """

    # Checked when a run or a probe starts: a run is of use without the plugin that has its pooling.
    features: str = "mean"
    clips: Annotated[int, Field(ge=1)] = 1
    train_shards: str | None = None
    test_shards: str | None = None
    # Epochs between nearest-neighbour probes while training, on both shards; None = never.
    every_epochs: Annotated[float, Field(gt=0)] | None = None


class WandbSettings(Settings):
    """W&B. What is None is taken from the environment (`settled`)."""

    # None: $WANDB_MODE, else disabled.
    mode: Literal["disabled", "online", "offline"] | None = None
    # None: $WANDB_PROJECT, else arvideo_ds.
    project: str | None = None
    # None: $WANDB_ENTITY, else the default of the account.
    entity: str | None = None
    # Runs of a group are shown together. ablate.py and compare_finetuning.py set group and tags
    # themselves where no group is given: the seeds of a recipe are a group.
    group: str | None = None
    tags: tuple[str, ...] = ()

    def settled(self, environment: Mapping[str, str] = os.environ) -> WandbSettings:
        """With mode, project and entity chosen. Errors: `UserError` for an unknown WANDB_MODE."""
        named = environment.get("WANDB_MODE") or "disabled"
        mode = self.mode or {"dryrun": "offline", "run": "online"}.get(named, named)
        if mode not in ("disabled", "online", "offline"):
            raise UserError(
                f"WANDB_MODE={named} in the environment: expected online, offline or disabled. "
                "wandb.mode of the recipe overrides it."
            )
        chosen = {
            "mode": mode,
            "project": self.project or environment.get("WANDB_PROJECT") or "arvideo_ds",
            "entity": self.entity or environment.get("WANDB_ENTITY") or None,
        }
        return self.model_copy(update=chosen)


class Recipe(Settings):
    """What every run says, as its YAML file says it; `load_recipe` reads one."""

    # Whether the task trains on labels, so that the protocols of labelled data sets apply.
    learns_labels: ClassVar[bool] = False

    task: str
    model: ModelSettings
    data: DataSettings = DataSettings()
    optim: OptimSettings = OptimSettings()
    train: TrainSettings
    wandb: WandbSettings = WandbSettings()

    @property
    def size(self) -> Size:
        return BACKBONES[self.model.name][self.model.size]

    @property
    def patch(self) -> Triple:
        return self.model.patch or (TUBELET, self.size.patch, self.size.patch)

    @property
    def clip(self) -> Triple:
        """Frames, height and width."""
        return (self.data.frames, *self.data.size)

    @property
    def geometry(self) -> Geometry:
        """The whole clip as one cluster, in which every token sees every other."""
        return Geometry.whole(self.clip, self.patch)

    @property
    def encoder(self) -> EncoderSpec:
        model = self.model
        return EncoderSpec(
            self.geometry, self.size, model.positions, self.pretrained_grid, model.name
        )

    @property
    def counts(self) -> TokenCounts:
        tokens = self.geometry.num_tokens
        return TokenCounts(encoded=tokens, decoded=0, predicted=0)

    @property
    def heads(self) -> tuple[str, ...] | None:
        """Label sets that a classifier of this recipe learns; None = the one label of a sample."""
        return None

    @property
    def pooling(self) -> str:
        """How a classifier of this recipe makes one vector of the tokens."""
        return "mean"

    @property
    def transfer(self) -> TransferSettings | None:
        """How pretrained weights are taken over, where the task does."""
        return None

    @property
    def ema_decay(self) -> float | None:
        """Of the moving average of the weights; None where none is kept."""
        return None if self.transfer is None else self.transfer.ema_decay

    @property
    def pretrained_grid(self) -> Triple | None:
        """Token grid whose table of positions is interpolated; None where nothing is.

        Errors: `UserError` where it is asked for and the pretraining's clip is not known.
        """
        transfer = self.transfer
        if transfer is None or transfer.positions != "interpolated":
            return None
        key, clip = f"{self.task}.pretrained_clip", transfer.pretrained_clip
        if clip is None:
            raise UserError(
                f"{self.task}.positions=interpolated needs the clip of the pretraining, and the "
                f"weights do not say it: give {key}=[FRAMES,HEIGHT,WIDTH], such as [16,224,224]."
            )
        if any(side % step for side, step in zip(clip, self.patch, strict=True)):
            raise UserError(
                f"{key}={list(clip)} is no multiple of model.patch={list(self.patch)}; give the "
                "frames, height and width of the clips in pretraining."
            )
        return Geometry.whole(clip, self.patch).grid

    @model_validator(mode="after")
    def _length_and_batch(self) -> Self:
        if self.train.epochs is None and self.train.max_steps is None:
            raise UserError("the run has no length: give train.epochs or train.max_steps.")
        if self.train.total_batch % self.data.repeats:
            raise UserError(
                f"train.total_batch={self.train.total_batch} clips is no multiple of "
                f"data.repeats={self.data.repeats} clips per video."
            )
        return self


class PretrainRecipe(Recipe):
    """A run that needs no labels."""

    task: Literal["pretrain"] = "pretrain"
    objective: ObjectiveSettings = ArvideoSettings()
    decoder: DecoderSettings = DecoderSettings()
    probe: ProbeSettings = ProbeSettings()

    @property
    def geometry(self) -> Geometry:
        return self.objective.geometry(self.clip, self.patch)

    @property
    def counts(self) -> TokenCounts:
        return self.objective.counts(self.geometry, self.decoder)

    @property
    def target_values(self) -> int:
        """Numbers that the decoder predicts for each token."""
        return self.objective.target_values(self.geometry)

    @property
    def decoder_shape(self) -> DecoderShape:
        return self.objective.decoder_shape(self.size, self.decoder)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        """Contradictions between sections, each said with the keys that hold it."""
        geometry = self.geometry
        self.objective.check(geometry, self.decoder)
        shape = self.decoder_shape
        if shape.width % shape.heads or shape.width % 2:
            raise UserError(
                f"decoder.width {shape.width} must be even and a multiple of decoder.heads "
                f"{shape.heads}."
            )
        if self.probe.features in ("change", "course") and geometry.grid[0] < 2:
            raise UserError(
                f"probe.features={self.probe.features} compares later times with earlier ones, but "
                f"data.frames={self.data.frames} makes only one. Set probe.features: mean."
            )
        return self


class FinetuneRecipe(Recipe):
    """A run that trains a classifier on labels, from pretrained weights or from scratch."""

    learns_labels: ClassVar[bool] = True

    task: Literal["finetune"] = "finetune"
    finetune: FinetuneSettings = FinetuneSettings()
    evaluation: EvaluationSettings = EvaluationSettings()

    @property
    def transfer(self) -> FinetuneSettings:
        return self.finetune

    @property
    def heads(self) -> tuple[str, ...] | None:
        return self.finetune.heads

    @property
    def pooling(self) -> str:
        return self.finetune.pooling

    @property
    def seen_places(self) -> int:
        """Places of the picture (row, column) that are seen while training, at all times."""
        _, h, w = self.geometry.grid
        return num_kept(1 - self.finetune.drop_tokens, h * w)

    @property
    def counts(self) -> TokenCounts:
        """Of a training step; a test sees all tokens."""
        seen = self.seen_places * self.geometry.grid[0]
        return TokenCounts(encoded=seen, decoded=0, predicted=0)

    @model_validator(mode="after")
    def _heads_are_sets(self) -> Self:
        heads, count = self.finetune.heads, self.finetune.num_classes
        if heads is not None and (not heads or len(set(heads)) < len(heads)):
            raise UserError(
                f"finetune.heads={list(heads)} must name each label set once, such as [verb, "
                "noun]; leave it out for samples of one label."
            )
        if heads is not None and count is not None:
            raise UserError(
                f"finetune.num_classes={count} counts one label set, but finetune.heads="
                f"{list(heads)} are learnt; leave finetune.num_classes out."
            )
        return self

    @model_validator(mode="after")
    def _divides(self) -> Self:
        _ = self.geometry
        temporal, spatial = self.evaluation.views
        if self.evaluation.batch < temporal * spatial:
            raise UserError(
                f"evaluation.batch={self.evaluation.batch} is smaller than evaluation.views="
                f"{[temporal, spatial]}: the views of a video stay together. Raise it to "
                f"{temporal * spatial}."
            )
        return self


class DetectRecipe(Recipe):
    """A run that trains a detector of actions in boxes around keyframes."""

    learns_labels: ClassVar[bool] = True

    task: Literal["detect"] = "detect"
    detect: DetectSettings = DetectSettings()
    evaluation: DetectEvaluationSettings = DetectEvaluationSettings()

    @property
    def transfer(self) -> DetectSettings:
        return self.detect

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


class TokenizerRecipe(Recipe):
    """A run that trains the adaptive tokenizer of long video; it needs no labels."""

    task: Literal["tokenizer"] = "tokenizer"
    # Convolutions have no size of the table, so there is no key that would say one.
    model: CubeSettings  # type: ignore[assignment]
    tokenizer: TokenizerSettings = TokenizerSettings()
    evaluation: TokenizerEvaluationSettings = TokenizerEvaluationSettings()

    @property
    def size(self) -> Size:
        raise UserError(
            "this is the recipe of a tokenizer, which has no encoder to fine-tune, export or look "
            "into; give a run of scripts/pretrain.py or scripts/finetune.py."
        )

    @property
    def patch(self) -> Triple:
        return self.model.patch

    @property
    def ema_decay(self) -> float | None:
        return self.tokenizer.ema_decay

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self.tokenizer.check(self.geometry)
        return self


RECIPES: dict[str, type[Recipe]] = {
    "pretrain": PretrainRecipe,
    "finetune": FinetuneRecipe,
    "detect": DetectRecipe,
    "tokenizer": TokenizerRecipe,
}
