"""The sections that all recipes have, and what every recipe answers.

Each task has a file beside this one; objectives of pretraining are in objectives.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from arvideo_ds.config.objectives import TokenCounts
from arvideo_ds.config.settings import NonNegative, Positive, PositiveTriple, Settings, Share
from arvideo_ds.config.sizes import BACKBONES, TUBELET, EncoderSpec, Size, Transformer
from arvideo_ds.errors import UserError
from arvideo_ds.geometry import Geometry, Triple
from arvideo_ds.registry import Registry


class ModelSettings(Settings):
    # The encoder's architecture (docs/extending.md adds one).
    name: str = "vit"
    size: str
    # Frames, rows and columns of one token; from the size table by default.
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
    # Folder with manifest.json, as written by `arvideo shards`.
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
    # Folder of token scores of these shards (`arvideo score_tokens`), delivered with the clips.
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
            found = ", ".join(f"data.{key}={json.dumps(getattr(self, key))}" for key in wrong)
            remedy = ", ".join(f"data.{key}={json.dumps(needed[key])}" for key in wrong)
            raise UserError(
                f"data.scores={self.scores} needs clips whose tokens are tokens of the whole "
                f"video, and {found} changes them. Set {remedy}, or leave data.scores out."
            )
        return self


class OptimSettings(Settings):
    # The optimiser (optim/optimizers.py; docs/extending.md adds one).
    name: str = "adamw"
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
    # Of adamw: the same AdamW from torch (fused), or from DeepSpeed: FusedAdam, and CPUAdam where
    # the optimiser is offloaded. DeepSpeed's are compiled at first use.
    implementation: Literal["torch", "deepspeed"] = "torch"

    @model_validator(mode="after")
    def _implementation_of_adamw(self) -> Self:
        if self.implementation == "deepspeed" and self.name != "adamw":
            raise UserError(
                f"optim.implementation=deepspeed is DeepSpeed's AdamW, but optim.name={self.name}. "
                "Remove one of them."
            )
        return self


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
    # Below the half hour after which a collective times out.
    stall_s: Annotated[int, Field(ge=1, le=1500)] = 600


class WandbSettings(Settings):
    """W&B. What is None is taken from the environment (`settled`)."""

    # None: $WANDB_MODE, else disabled.
    mode: Literal["disabled", "online", "offline"] | None = None
    # None: $WANDB_PROJECT, else arvideo_ds.
    project: str | None = None
    # None: $WANDB_ENTITY, else the default of the account.
    entity: str | None = None
    # Runs of a group are shown together. ablate.py sets group and tags
    # itself where no group is given: the seeds of a recipe are a group.
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
    """What every run says, as its YAML file says it; `load_recipe` reads one.

    A task is a subclass that is registered in `RECIPES`, and a specification (tasks/).
    """

    # What a run does, the command that starts one, what a run is called, and the command that
    # tests one: for messages.
    purpose: ClassVar[str]
    script: ClassVar[str]
    run_name: ClassVar[str]
    tested_by: ClassVar[str]
    # Whether the task trains on labels, so that the protocols of labelled data sets apply.
    learns_labels: ClassVar[bool] = False

    task: str
    model: Settings
    data: DataSettings = DataSettings()
    optim: OptimSettings = OptimSettings()
    train: TrainSettings
    wandb: WandbSettings = WandbSettings()

    @property
    def patch(self) -> Triple:
        """Frames, rows and columns of one token."""
        raise NotImplementedError(type(self).__name__)

    @property
    def clip(self) -> Triple:
        """Frames, height and width."""
        return (self.data.frames, *self.data.size)

    @property
    def geometry(self) -> Geometry:
        """The whole clip as one cluster, in which every token sees every other."""
        return Geometry.whole(self.clip, self.patch)

    @property
    def counts(self) -> TokenCounts:
        """Tokens of a clip of training."""
        tokens = self.geometry.num_tokens
        return TokenCounts(encoded=tokens, decoded=0, predicted=0)

    @property
    def heads(self) -> tuple[str, ...] | None:
        """Label sets whose labels come with the clips; None = the one label of a sample."""
        return None

    @property
    def needs_scores(self) -> bool:
        """Whether the scores of data.scores must come with the clips."""
        return False

    @property
    def transformer(self) -> Transformer | None:
        """What is trained, where it is a transformer."""
        return None

    def notes(self) -> list[str]:
        """Settings that are allowed but probably not intended, a sentence each."""
        return []

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


class EncoderRecipe(Recipe):
    """What every run says that trains a video encoder."""

    model: ModelSettings

    @property
    def size(self) -> Size:
        return BACKBONES[self.model.name][self.model.size]

    @property
    def patch(self) -> Triple:
        return self.model.patch or (TUBELET, self.size.patch, self.size.patch)

    @property
    def encoder(self) -> EncoderSpec:
        model = self.model
        return EncoderSpec(
            self.geometry, self.size, model.positions, self.pretrained_grid, model.name
        )

    @property
    def pooling(self) -> Literal["mean", "attention"]:
        """How one vector is made of a clip's tokens."""
        return "mean"

    @property
    def pretrained_clip(self) -> Triple | None:
        """Frames, height and width whose table of positions is interpolated, if any."""
        return None

    @property
    def pretrained_grid(self) -> Triple | None:
        """Its token grid."""
        clip = self.pretrained_clip
        return None if clip is None else Geometry.whole(clip, self.patch).grid

    @property
    def test_views(self) -> tuple[int, int]:
        """Temporal x spatial views of a video in a test."""
        return (1, 1)

    @property
    def transformer(self) -> Transformer:
        return Transformer(self.size, self.model.size)


# A recipe for each task, by the value of `task`.
RECIPES: Registry[type[Recipe]] = Registry(
    "task",
    {
        "pretrain": "arvideo_ds.config.pretrain:PretrainRecipe",
        "finetune": "arvideo_ds.config.finetune:FinetuneRecipe",
        "detect": "arvideo_ds.config.detect:DetectRecipe",
        "tokenizer": "arvideo_ds.config.tokenizer:TokenizerRecipe",
    },
)
