"""Sections and properties that all recipes share.

Each task has its own file in this package; objectives of pretraining are in objectives.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from typing_extensions import Self

from arvideo_ds.config.objectives import TokenCounts
from arvideo_ds.config.settings import NonNegative, Positive, PositiveTriple, Settings, Share
from arvideo_ds.config.sizes import BACKBONES, TUBELET, EncoderSpec, Pooling, Size, Transformer
from arvideo_ds.config.sources import (
    EXCLUSIVE,
    CropName,
    Sampling,
    Scale,
    SourceSettings,
    whole_weights,
)
from arvideo_ds.errors import UserError
from arvideo_ds.geometry import Geometry, Triple
from arvideo_ds.registry import Registry


class ModelSettings(Settings):
    """The encoder."""

    name: str = "vit"
    """The encoder's architecture (docs/extending.md adds one)."""
    size: str
    """Width, depth and heads: a row of the size table (config/sizes.py)."""
    patch: PositiveTriple | None = None
    """Frames, rows and columns of one token; from the size table by default."""
    positions: Literal["sincos_1d", "sincos_3d"] = "sincos_1d"
    """Position table. sincos_1d: VideoMAE's, of the token's index. sincos_3d: time, row and column
    separately (docs/method.md)."""

    @model_validator(mode="after")
    def _size_of_backbone(self) -> Self:
        sizes = BACKBONES.choose(self.name, key="model.name")
        if self.size not in sizes:
            known = ", ".join(sizes)
            raise UserError(
                f"model.size={self.size}: model.name={self.name} has the sizes {known}."
            )
        return self


class DataSettings(Settings):
    """Shards, how clips are cut from their videos, and how they are loaded."""

    shards: str | None = None
    """Folder with manifest.json, as written by `arvideo shards`."""
    sources: tuple[SourceSettings, ...] | None = None
    """Several folders of shards, with weights, in place of `shards`; for tasks without labels."""
    num_videos: Positive | None = None
    """Number of videos that the plan assumes before the shards exist (a published count); of
    `sources`, each has its own."""
    frames: Positive = 16
    """Frames of a clip."""
    size: tuple[Positive, Positive] = (224, 224)
    """Height and width of a clip in pixels; one number for a square."""
    stride: Positive | None = 4
    """Frames of the video from one of a clip to the next; null with `fps`."""
    fps: Annotated[float, Field(gt=0)] | None = None
    """Frames of a clip per second, at any frame rate of the videos; replaces `stride`."""
    sampling: Sampling = "dense"
    """Frames `stride` apart (or 1 / `fps` seconds) from a random start ("dense"), or one frame per
    segment ("uniform")."""
    crop: CropName = "multi_scale"
    """multi_scale: sides are `crop_scales` of the largest crop, at most one step apart.
    random_resized: a share of the area within `crop_area`, aspect 3:4 to 4:3. grid: short side as
    the clip's, box at a multiple of the patch (for data.scores). short_side: short side as
    `short_side`, uniform box of the clip's size."""
    crop_scales: Annotated[tuple[Scale, ...], Field(min_length=1)] = (1.0, 0.875, 0.75, 0.66)
    """Scales of crop=multi_scale; [1.0] is the plain crop."""
    crop_area: tuple[Scale, Scale] = (0.08, 1.0)
    """Smallest and largest share of the frame's area for crop=random_resized."""
    short_side: Positive = 256
    """Pixels of the frame's shorter side from which crop=short_side cuts its box."""
    test_short_side: Positive | None = None
    """Pixels of the frame's shorter side from which test views are cut; null: as large as fit."""
    flip: bool = False
    """Mirror half of the clips, drawn at random; refused for data sets whose labels tell left from
    right, such as Something-Something."""
    scores: str | None = None
    """Folder of token scores of these shards (`arvideo score_tokens`), loaded with the clips."""
    randaugment: str | None = None
    """timm's RandAugment, such as "rand-m7-n4-mstd0.5-inc1", the same for all frames of a clip."""
    hsv_jitter: tuple[Annotated[float, Field(ge=0, le=180)], Share, Share] | None = None
    """Largest shift of hue (degrees), saturation and value (0..1), drawn uniformly per clip."""
    erase: Share = 0.0
    """Probability that a box of the clip is replaced by noise (random erasing)."""
    repeats: Positive = 1
    """Clips cut from each decoded video (repeated augmentation, VideoMAE V2)."""
    segments: bool = False
    """The repeats are clips from as many equal parts of the video, in order, not crops of the same
    frames. A classifier then pools the tokens of all clips of a video together."""
    decoder: Literal["auto", "torchcodec", "decord", "pyav"] = "auto"
    """Library that decodes videos. auto: PyAV for layered shards, which it decodes fastest, else
    the first of torchcodec, PyAV and decord that works on every rank."""
    planes: bool = False
    """Keep clips as YUV 4:2:0, half the bytes of RGB, until the device converts them; decodes with
    PyAV. Crops are resized before the conversion, so pixels differ slightly."""
    workers: NonNegative | Literal["auto"] = "auto"
    """Processes of a rank that decode; auto: its cores; above 8 less one, and
    at most one per batch that `prefetch_mib` allows."""
    prefetch: Positive = 2
    """Batches that each worker prepares ahead, as far as `prefetch_mib` allows."""
    prefetch_mib: Positive = 4096
    """Memory limit of prefetched batches in MiB, over all workers of a rank."""
    num_streams: Positive = 48
    """Number of streams that the order of samples is cut into. The number of ranks divides it,
    except with `sources`."""
    window_shards: Positive = 4
    """Samples are shuffled within windows of this many shards."""
    max_skipped_share: Share = 0.01
    """The run stops above this share of undecodable samples."""
    timeout_s: Positive = 300
    """Seconds without a batch after which the decoder counts as hung."""

    @field_validator("size", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int | str) else value

    @model_validator(mode="before")
    @classmethod
    def _stride_or_fps(cls, tree: Any) -> Any:
        if not isinstance(tree, dict) or tree.get("fps") is None:
            return tree
        if tree.get("stride") is not None:
            raise UserError(
                f"data.stride={tree['stride']} and data.fps={tree['fps']} exclude each other. "
                "Remove one, or set it to null, such as data.stride=null."
            )
        return {**tree, "stride": None}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.stride is None and self.fps is None:
            raise UserError("data.stride is null: give a number of frames, or data.fps.")
        if self.fps is not None and self.sampling == "uniform":
            raise UserError(
                f"data.fps={self.fps:g} has no effect with data.sampling=uniform, one frame of "
                "each segment. Set data.sampling: dense, or remove data.fps."
            )
        if self.crop == "short_side" and self.short_side < max(self.size):
            raise UserError(
                f"data.short_side={self.short_side} is smaller than data.size={list(self.size)}, "
                f"so the crop does not fit into the frame. Raise it to {max(self.size)} or more."
            )
        if self.test_short_side is not None and self.test_short_side < max(self.size):
            raise UserError(
                f"data.test_short_side={self.test_short_side} is smaller than data.size="
                f"{list(self.size)}, so the view does not fit into the frame. Raise it to "
                f"{max(self.size)} or more, or remove it."
            )
        self._check_planes()
        # Stored scores fit a clip only where its tokens are tokens of the whole video.
        needed = {"crop": "grid", "sampling": "dense", "flip": False, "fps": None}
        needed |= {"randaugment": None, "hsv_jitter": None, "erase": 0.0, "segments": False}
        wrong = [key for key, value in needed.items() if getattr(self, key) != value]
        if self.scores is not None and wrong:
            actual = ", ".join(f"data.{key}={json.dumps(getattr(self, key))}" for key in wrong)
            remedy = ", ".join(f"data.{key}={json.dumps(needed[key])}" for key in wrong)
            raise UserError(
                f"data.scores={self.scores} needs clips whose tokens are tokens of the whole "
                f"video, and {actual} changes them. Set {remedy}, or remove data.scores."
            )
        if self.sources is not None:
            self._check_sources(self.sources)
        return self

    def _check_planes(self) -> None:
        if not self.planes:
            return
        wrong = [
            key for key in ("randaugment", "hsv_jitter", "erase", "scores") if getattr(self, key)
        ]
        wrong += ["crop"] * (self.crop in ("grid", "short_side"))
        wrong += ["decoder"] * (self.decoder not in ("auto", "pyav"))
        wrong += ["size"] * any(side % 2 for side in self.size)
        if wrong:
            actual = ", ".join(f"data.{key}={json.dumps(getattr(self, key))}" for key in wrong)
            raise UserError(
                f"data.planes=true does not go with {actual}: clips stay in YUV 4:2:0, of even "
                "sizes, decoded by PyAV, and only cropped and flipped. Remove one of them."
            )

    def stride_at(self, fps: float) -> float:
        """Frames from one of a clip to the next in a video of `fps` frames per second."""
        if self.fps is not None:
            return fps / self.fps
        assert self.stride is not None
        return self.stride

    def _check_sources(self, sources: tuple[SourceSettings, ...]) -> None:
        given = {key: getattr(self, key) for key in ("shards", "scores")}
        if excluded := {key: value for key, value in given.items() if value is not None}:
            listed = ", ".join(f"data.{key}={value}" for key, value in excluded.items())
            remedy = ", ".join(f"data.{key}: null" for key in excluded)
            raise UserError(
                f"{listed} and data.sources exclude each other. Set {remedy}; or data.sources: "
                "null."
            )
        if not sources:
            raise UserError("data.sources is empty; give a list such as [{shards: A, weight: 1}].")
        names = [source.name for source in sources if source.name is not None]
        if len(set(names)) < len(names):
            raise UserError(f"two of data.sources have the same name, of {', '.join(names)}.")
        _ = whole_weights(sources)
        for number in range(len(sources)):
            try:
                _ = self.of_source(number)
            except (UserError, ValidationError) as error:
                reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
                raise UserError(f"data.sources.{number}: {reason}") from None

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders of shards to train on: none, one, or those of the sources."""
        if self.sources is not None:
            return tuple(source.shards for source in self.sources)
        return () if self.shards is None else (self.shards,)

    @property
    def expects_videos(self) -> bool:
        """Whether a run can be planned before its shards exist."""
        counted = self.sources or (self,)
        return all(each.num_videos is not None for each in counted)

    @property
    def shared_streams(self) -> int:
        """The number that the number of ranks must divide; 0 for a mixture, where every rank reads
        from all streams."""
        return 0 if self.sources is not None else self.num_streams

    def of_source(self, number: int) -> DataSettings:
        """The settings of a source of a mixture, as if it were alone."""
        assert self.sources is not None
        source = self.sources[number]
        replaced = EXCLUSIVE if EXCLUSIVE & source.own.keys() else frozenset[str]()
        tree = self.model_dump(exclude={"sources", *replaced})
        tree |= {"shards": source.shards, "num_videos": source.num_videos, **source.own}
        return DataSettings.model_validate(tree)


class OptimSettings(Settings):
    """Learning rates are given for 256 videos per step, and scaled by V / 256.

    V = train.total_batch / data.repeats is the number of videos per step: several clips of a video
    count once, as in the official scripts of VideoMAE and VideoMAE V2.
    """

    name: str = "adamw"
    """The optimiser (optim/optimizers.py; docs/extending.md adds one)."""
    base_lr: Annotated[float, Field(gt=0)] = 1.5e-4
    """Peak learning rate for 256 videos per step, after the warm-up from warmup_lr."""
    schedule: str = "cosine"
    """The learning rate after the warm-up (optim/schedule.py): cosine, down to min_lr; constant; or
    wsd (warm-up, stable, decay), constant until it falls to min_lr in the last decay_share."""
    decay_share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """wsd: share of the run's steps in which the learning rate falls."""
    warmup_lr: Annotated[float, Field(ge=0)] = 1e-6
    """Learning rate of the first step for 256 videos per step."""
    min_lr: Annotated[float, Field(ge=0)] = 1e-5
    """Final learning rate for 256 videos per step."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 40
    """Epochs in which the learning rate rises linearly from warmup_lr to base_lr."""
    warmup_steps: NonNegative | None = None
    """Replaces warmup_epochs, for runs whose length is given in steps."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """AdamW's decay rates of the moving averages of the gradient and of its square."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Weight decay of matrices and kernels; biases, norms and learned queries have none."""
    clip: Annotated[float, Field(ge=0)] = 0.0
    """Largest norm of the gradient; 0 does not clip."""
    implementation: Literal["torch", "deepspeed"] = "torch"
    """AdamW of torch (fused) or DeepSpeed (FusedAdam, CPUAdam if offloaded; built at first use)."""

    @model_validator(mode="after")
    def _implementation_of_adamw(self) -> Self:
        if self.implementation == "deepspeed" and self.name != "adamw":
            raise UserError(
                f"optim.implementation=deepspeed is DeepSpeed's AdamW, but optim.name={self.name}. "
                "Remove one of them."
            )
        return self


class TrainSettings(Settings):
    """Length, batch, precision, checkpoints and what stops a run."""

    epochs: Positive | None = None
    """Length of the run in passes over the videos of data.shards."""
    max_steps: Positive | None = None
    """Length of the run in optimiser steps, including the schedule; overrides epochs."""
    total_batch: Positive
    """Clips per optimiser step over all ranks, repeats counted."""
    micro_batch: Positive
    """Largest number of clips per rank and forward pass; the rest is accumulated. Mixup pairs clips
    within it, all else is the same."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Type of weights and activations in forward and backward passes; with bf16 and fp16 the
    optimiser keeps fp32 weights, with fp16 the loss is scaled."""
    grad_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Type in which gradients of micro-batches are summed. auto: fp32 where there are several, else
    that of `precision`. Ranks average each micro-batch in `precision`; fp32 needs ZeRO stage 2, so
    that stage 1 runs as 2."""
    tf32: bool = False
    """Whether a GPU may round the inputs of fp32 matrix products to TF32 (10 bits); torch's default
    is not to. Convolutions keep torch's default."""
    peak_tflops: Annotated[float, Field(gt=0)] | None = None
    """Dense peak of one GPU in the run's precision, for throughput/share_of_peak; by default from
    the table of GPUs (planning/gpus.py)."""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile of model and loss, or of each layer if layers are recomputed; the first step
    takes a minute longer. auto: on a GPU, where the DeepSpeed JSON allows it."""
    seed: NonNegative = 0
    """Seed of the initial weights, the order of samples and everything drawn for a clip."""
    log_every: Positive = 10
    """Steps between lines of the console and of metrics.jsonl, besides the first step's."""
    save_every: Positive = 500
    """Steps between checkpoints; one is always written at the end and when interrupted."""
    keep_checkpoints: Positive = 2
    """Complete checkpoints that are kept; older ones are deleted."""
    max_refused_steps: Positive = 20
    """Largest number of consecutive steps skipped because loss or gradient was not finite."""
    stall_s: Annotated[int, Field(ge=1, le=1500)] = 600
    """Seconds without progress until the stacks of all ranks are written; collectives wait 1800."""
    flight_recorder: bool = False
    """NCCL's last collectives are written to OUTPUT/flight_recorder when one times out."""

    @model_validator(mode="after")
    def _gradients_of_precision(self) -> Self:
        if self.grad_dtype not in ("auto", "fp32", self.precision):
            raise UserError(
                f"train.grad_dtype={self.grad_dtype} does not go with train.precision="
                f"{self.precision}. Use auto, or fp32."
            )
        return self

    def gradients_in(self, accumulation: int) -> str:
        """Type in which the gradients of so many micro-batches are summed."""
        if self.grad_dtype == "auto":
            return "fp32" if accumulation > 1 else self.precision
        return self.grad_dtype


class WandbSettings(Settings):
    """Logging to Weights & Biases; keys that are null are taken from the environment."""

    mode: Literal["disabled", "online", "offline"] | None = None
    """online: to the server. offline: to files. null: `$WANDB_MODE`, else disabled."""
    project: str | None = None
    """Project of the run; null: `$WANDB_PROJECT`, else arvideo_ds."""
    entity: str | None = None
    """Account or team of the project; null: `$WANDB_ENTITY`, else the account's default."""
    group: str | None = None
    """Runs of a group are shown together; `arvideo ablate` groups the seeds of a recipe."""
    tags: tuple[str, ...] = ()
    """Tags of the run, to filter by."""

    def settled(self, environment: Mapping[str, str] = os.environ) -> WandbSettings:
        """With mode, project and entity chosen. Errors: `UserError` for an unknown WANDB_MODE."""
        named = environment.get("WANDB_MODE") or "disabled"
        mode = self.mode or {"dryrun": "offline", "run": "online"}.get(named, named)
        if mode not in ("disabled", "online", "offline"):
            raise UserError(
                f"WANDB_MODE={named} in the environment: expected online, offline or disabled. "
                "wandb.mode of the recipe overrides it."
            )
        project = self.project or environment.get("WANDB_PROJECT") or "arvideo_ds"
        entity = self.entity or environment.get("WANDB_ENTITY") or None
        return self.model_copy(update={"mode": mode, "project": project, "entity": entity})


class TrackerSettings(Settings):
    """Logs of the metrics beside metrics.jsonl and W&B; each needs the package of its name."""

    tensorboard: bool = False
    """Event files in OUTPUT/tensorboard."""
    trackio: str | None = None
    """Project of Trackio, in `$TRACKIO_DIR`; null: not used."""


class Recipe(Settings):
    """All settings of one run. A task is a subclass in `RECIPES` and a specification (tasks/)."""

    # For messages: what a run does, its command, what a run is called, and the command that tests
    # it. learns_labels: the task trains on labels, so protocols of labelled data sets apply.
    purpose: ClassVar[str]
    script: ClassVar[str]
    run_name: ClassVar[str]
    tested_by: ClassVar[str]
    learns_labels: ClassVar[bool] = False
    # The section with the settings of a teacher.
    teacher_section: ClassVar[str | None] = None

    task: str = "pretrain"
    """What the run trains. The sections of a recipe depend on it."""
    model: Settings
    data: DataSettings = DataSettings()
    optim: OptimSettings = OptimSettings()
    train: TrainSettings
    wandb: WandbSettings = WandbSettings()
    trackers: TrackerSettings = TrackerSettings()

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
        """Tokens of a training clip."""
        return TokenCounts(encoded=self.geometry.num_tokens)

    @property
    def heads(self) -> tuple[str, ...] | None:
        """Label sets whose labels come with the clips; None = the one label of a sample."""
        return None

    @property
    def needs_scores(self) -> bool:
        """Whether clips need the scores of data.scores."""
        return False

    @property
    def teacher(self) -> str | None:
        """Where the weights of a teacher are, or ema; None = the run has none."""
        section = self.teacher_section
        return None if section is None else getattr(self, section).teacher

    @property
    def transformer(self) -> Transformer | None:
        """The trained model, where it is a transformer."""
        return None

    @property
    def ema_decay(self) -> float | None:
        """Decay of the moving average of the weights; None = the run keeps none."""
        return None

    def notes(self) -> list[str]:
        """Settings that are allowed but probably not intended, a sentence each."""
        return []

    @property
    def phase_shares(self) -> tuple[float, ...]:
        """Shares of the run's steps, by phase."""
        return (1.0,)

    def by_phase(self) -> list[Self]:
        """The recipe of each phase, as if it were alone; without phases, itself."""
        return [self]

    def by_source(self) -> list[Self]:
        """The recipe of each source of a mixture, as if it were alone; without one, itself."""
        if self.data.sources is None:
            return [self]
        numbers = range(len(self.data.sources))
        return [self.model_copy(update={"data": self.data.of_source(n)}) for n in numbers]

    @model_validator(mode="after")
    def _length_and_batch(self) -> Self:
        if self.train.epochs is None and self.train.max_steps is None:
            raise UserError("the run has no length: give train.epochs or train.max_steps.")
        if self.data.sources is not None:
            self._check_mixture()
        if self.train.total_batch % self.data.repeats:
            raise UserError(
                f"train.total_batch={self.train.total_batch} is not a multiple of data.repeats="
                f"{self.data.repeats}."
            )
        return self

    def _check_mixture(self) -> None:
        if self.learns_labels:
            raise UserError(
                f"data.sources is for tasks that learn no labels, and task={self.task} does. Merge "
                "the shards by the names of their labels (arvideo reshard A B --output MERGED), "
                "and set data.shards: MERGED, data.sources: null."
            )
        if self.train.max_steps is None:
            raise UserError(
                "data.sources needs train.max_steps: every source has epochs of its own, so that "
                "the length of the run is given in steps."
            )


class EncoderRecipe(Recipe):
    """A recipe that trains a video encoder."""

    model: ModelSettings

    @property
    def size(self) -> Size:
        return BACKBONES[self.model.name][self.model.size]

    @property
    def patch(self) -> Triple:
        return self.model.patch or (TUBELET, self.size.patch, self.size.patch)

    @property
    def encoder(self) -> EncoderSpec:
        positions, backbone = self.model.positions, self.model.name
        return EncoderSpec(self.geometry, self.size, positions, self.pretrained_grid, backbone)

    @property
    def pooling(self) -> Pooling:
        """How a clip's tokens become one vector."""
        return "mean"

    @property
    def pooling_depth(self) -> int:
        """Blocks of an attentive pooling."""
        return 1

    @property
    def pretrained_clip(self) -> Triple | None:
        """Frames, height and width of the clip whose position table is interpolated, if any."""
        return None

    @property
    def pretrained_grid(self) -> Triple | None:
        """Its token grid."""
        clip = self.pretrained_clip
        return None if clip is None else Geometry.whole(clip, self.patch).grid

    @property
    def decoding(self) -> tuple[object, ...] | None:
        """What a pretraining decoder predicts, and its shape; equal where its weights fit."""
        return None

    @property
    def test_views(self) -> tuple[int, int]:
        """Temporal x spatial views of a video in a test."""
        return (1, 1)

    @property
    def transformer(self) -> Transformer:
        return Transformer(self.size, self.model.size)


# By the value of `task`.
RECIPES: Registry[type[Recipe]] = Registry(
    "task",
    {
        "pretrain": "arvideo_ds.config.pretrain:PretrainRecipe",
        "finetune": "arvideo_ds.config.finetune:FinetuneRecipe",
        "detect": "arvideo_ds.config.detect:DetectRecipe",
        "tokenizer": "arvideo_ds.config.tokenizer:TokenizerRecipe",
    },
)
