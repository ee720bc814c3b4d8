"""The recipe of fine-tuning: a classifier, trained on labels."""

from __future__ import annotations

import itertools
import json
import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from arvideo_ds.config.objectives import TokenCounts
from arvideo_ds.config.settings import Positive, PositiveTriple, Settings
from arvideo_ds.config.sizes import TUBELET, Pooling, TeacherShape, Transformer
from arvideo_ds.config.teachers import EMA, check_teacher, teacher_size
from arvideo_ds.config.transfer import TransferRecipe, TransferSettings
from arvideo_ds.errors import UserError
from arvideo_ds.geometry import Geometry, Triple, num_kept


class FinetuneSettings(TransferSettings):
    """How a classifier is trained on labels; defaults of VideoMAE for ViT-B on Kinetics-400."""

    num_classes: Positive | None = None
    """Number of classes that the plan assumes before the shards exist."""
    heads: tuple[str, ...] | None = None
    """Label sets that are learnt together, such as [verb, noun]: a linear layer each, the loss is
    their sum. null: the one label of each sample."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of each target that is spread evenly over all classes."""
    head_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before the linear layer while training. VideoMAE's --fc_drop_rate (0.5 for ViT-H on
    Kinetics-400 and ViT-B on UCF101), V2's --head_drop_rate."""
    mixup: Annotated[float, Field(ge=0)] = 0.8
    """Mixes the clips of a micro-batch in pairs, with a share from Beta(mixup, mixup); 0: never.
    With `cutmix` too, each micro-batch uses one of them."""
    cutmix: Annotated[float, Field(ge=0)] = 1.0
    """As mixup, but a box of one clip replaces the same box of the other; its area from
    Beta(cutmix, cutmix)."""
    drop_tokens: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of places dropped at all times while training (random tubes); tests see all tokens."""
    pooling: Pooling = "mean"
    """The classified feature: the mean of the tokens, the mean of their absolute changes from one
    time to the next ("motion": for a still camera and few videos), the output of a class-attention
    layer, or of the attentive probe of V-JEPA and V-JEPA 2."""
    pooling_depth: Positive = 4
    """Blocks of pooling=attentive: the last has the query, those before are self-attention over all
    tokens. V-JEPA 2: 4, V-JEPA: 1."""
    head_lrs: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """Learning rates for 256 videos per step, each with every one of `head_weight_decays`: a head
    for every pair, all trained at once on the tokens of the frozen encoder. The rate of each has
    the shape of that of `optim.base_lr`. The head with the highest top-1 on evaluation.shards is
    exported. Empty: one head."""
    head_weight_decays: tuple[Annotated[float, Field(ge=0)], ...] = ()
    """Weight decays of `head_lrs`, of all weights of a head, biases and norms too, as published."""
    train: Literal["all", "head", "lora"] = "all"
    """Trained weights: all; those after the encoder, which is frozen and in evaluation mode
    ("head"); or those and low-rank adapters of the frozen encoder ("lora"), merged on export."""
    lora_rank: Positive = 8
    """Rank of the adapters of train=lora."""
    lora_alpha: Annotated[float, Field(gt=0)] = 16.0
    """Adapters are multiplied by lora_alpha / lora_rank."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before the adapters while training."""
    lora_mlp: bool = False
    """Whether the MLPs have adapters too, not only attention (qkv, proj)."""
    teacher: str | None = None
    """Learn the class scores of this frozen classifier too: a fine-tuned run, its export, a public
    fine-tuned file or folder, with the same classes (docs/teachers.md)."""
    teacher_weight: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the divergence from the teacher's scores in the loss; the labels have the rest."""
    teacher_temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides the scores of both before the softmax; the divergence is multiplied by its square."""
    teacher_size: str | None = None
    """The teacher's model.size; by default read from its recipe.yaml or config.json, and recorded
    in the run's recipe.yaml."""
    teacher_patch: PositiveTriple | None = None
    """The teacher's model.patch, recorded likewise; by default read from its recipe.yaml, else that
    of its size."""
    teacher_clip: PositiveTriple | None = None
    """Frames, height and width of the teacher's clips, read and recorded as teacher_size; its
    positions are interpolated for clips of another shape."""

    @property
    def mixes(self) -> bool:
        return bool(self.mixup or self.cutmix)

    @property
    def head_grid(self) -> list[tuple[float, float]]:
        """Learning rate and weight decay of each head; empty without `head_lrs`."""
        return list(itertools.product(self.head_lrs, self.head_weight_decays))

    @model_validator(mode="after")
    def _heads_of_a_probe(self) -> Self:
        given = bool(self.head_lrs)
        if given != bool(self.head_weight_decays):
            raise UserError(
                "finetune.head_lrs and finetune.head_weight_decays belong together; give both."
            )
        if self.pooling != "attentive" and self.pooling_depth != 4:
            raise UserError(
                f"finetune.pooling_depth={self.pooling_depth} has no effect with finetune.pooling="
                f"{self.pooling}. Remove it, or set finetune.pooling=attentive."
            )
        needed: dict[str, Any] = {"train": "head", "pooling": "attentive", "head_dropout": 0}
        needed |= {"heads": None, "teacher": None}
        wrong = [key for key, value in needed.items() if getattr(self, key) != value]
        if given and wrong:
            remedy = " ".join(f"finetune.{key}={json.dumps(needed[key])}" for key in wrong)
            remedy = remedy.replace('"', "")
            raise UserError(
                "finetune.head_lrs trains several heads of one frozen encoder with an attentive "
                f"pooling, each as if it were alone. Set {remedy}, or remove finetune.head_lrs."
            )
        return self

    @model_validator(mode="after")
    def _of_trained_weights(self) -> Self:
        idle = {} if self.train != "head" else {"layer_decay": 1.0, "drop_path": 0.0}
        if self.train != "lora":
            fields = type(self).model_fields
            idle |= {name: fields[name].default for name in fields if name.startswith("lora_")}
        if wrong := [name for name, value in idle.items() if getattr(self, name) != value]:
            actual = ", ".join(f"finetune.{name}={getattr(self, name)}" for name in wrong)
            remedy = " ".join(f"finetune.{name}={idle[name]}" for name in wrong)
            raise UserError(
                f"{actual} would have no effect with finetune.train={self.train}. Set {remedy}, or "
                "another finetune.train."
            )
        return self

    @field_validator("heads", mode="before")
    @classmethod
    def _a_list(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError("must be a list of label sets, such as [verb, noun]")
        return value


class EvaluationSettings(Settings):
    """Labelled shards on which a fine-tuned model is tested, while training and afterwards."""

    shards: str | None = None
    """Folder of labelled shards to test on; null: only training."""
    every_epochs: Annotated[float, Field(gt=0)] = 1.0
    """Epochs between validations (one view per video); the best weights are kept."""
    views: tuple[Positive, Positive] = (2, 3)
    """Temporal x spatial views of the test after training."""
    batch: Positive = 48
    """Clips per rank and forward pass; a video's views stay together."""


class FinetuneRecipe(TransferRecipe):
    """A run that trains a classifier on labels, from pretrained weights or from scratch."""

    purpose: ClassVar[str] = "finetune"
    script: ClassVar[str] = "finetune"
    run_name: ClassVar[str] = "a fine-tuned run"
    tested_by: ClassVar[str] = "evaluate"
    teacher_section: ClassVar[str] = "finetune"

    task: Literal["finetune"] = "finetune"
    finetune: FinetuneSettings = FinetuneSettings()
    evaluation: EvaluationSettings = EvaluationSettings()

    @property
    def heads(self) -> tuple[str, ...] | None:
        return self.finetune.heads

    @property
    def pooling(self) -> Pooling:
        return self.finetune.pooling

    @property
    def pooling_depth(self) -> int:
        return self.finetune.pooling_depth

    def joint(self, views: tuple[int, int]) -> tuple[int, int]:
        """Views, temporal x spatial, as the classifier takes them; 1 x 1: each clip alone."""
        return views if self.data.segments else (1, 1)

    @property
    def training_views(self) -> tuple[int, int]:
        """Clips of a video in a training step and in a validation that are pooled together."""
        return self.joint((self.data.repeats, 1))

    @property
    def test_views(self) -> tuple[int, int]:
        return self.evaluation.views

    @property
    def teacher_shape(self) -> TeacherShape | None:
        """Errors: `UserError` where its size is unknown or its patch does not divide the clip."""
        settings = self.finetune
        size = teacher_size("finetune", settings.teacher, settings.teacher_size)
        if size is None:
            return None
        patch: Triple = settings.teacher_patch or (TUBELET, size.patch, size.patch)
        if any(side % step for side, step in zip(self.clip, patch, strict=True)):
            raise UserError(
                f"finetune.teacher={settings.teacher} cuts clips into cubes of {list(patch)} "
                f"(frames, rows, columns; finetune.teacher_patch), which do not divide the "
                f"recipe's {list(self.clip)}. Change data.frames or data.size."
            )
        return TeacherShape(size, Geometry.whole(self.clip, patch), scores=True)

    @property
    def transformer(self) -> Transformer:
        return Transformer(
            self.size,
            self.model.size,
            class_attention=self.pooling == "attention",
            outputs=self.finetune.num_classes or 0,
            mixes_clips=self.finetune.mixes,
            frozen=self.finetune.train != "all",
            lora_rank=self.finetune.lora_rank if self.finetune.train == "lora" else 0,
            lora_mlp=self.finetune.lora_mlp,
            teacher=self.teacher_shape,
            attentive=self.pooling_depth if self.pooling == "attentive" else 0,
            heads=max(1, len(self.finetune.head_grid)),
            together=self.training_views[0],
        )

    @property
    def seen_places(self) -> int:
        """Places (row, column) that training sees, at all times."""
        _, h, w = self.geometry.grid
        return num_kept(1 - self.finetune.drop_tokens, h * w)

    @property
    def counts(self) -> TokenCounts:
        return TokenCounts(encoded=self.seen_places * self.geometry.grid[0])

    def notes(self) -> list[str]:
        settings, lines = self.finetune, super().notes()
        if settings.train != "all" and settings.init_from is None:
            lines.append(
                f"finetune.train={settings.train} freezes the encoder, and without --init-from its "
                "weights are random."
            )
        return lines

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _ = self.geometry  # checks that the patch divides the clip
        if self.pooling == "motion" and self.geometry.grid[0] < 2:
            raise UserError(
                f"finetune.pooling=motion compares times, but data.frames={self.data.frames} gives "
                "only one time. Set finetune.pooling=mean, or more frames."
            )
        heads, count = self.finetune.heads, self.finetune.num_classes
        if heads is not None and (not heads or len(set(heads)) < len(heads)):
            raise UserError(
                f"finetune.heads={list(heads)} must name each label set once, such as [verb, "
                "noun]; remove it for samples with one label."
            )
        if heads is not None and count is not None:
            raise UserError(
                f"finetune.num_classes={count} counts one label set, but finetune.heads="
                f"{list(heads)} are learnt; remove finetune.num_classes."
            )
        check_teacher("finetune", self.finetune)
        if self.finetune.teacher == EMA:
            raise UserError(
                "finetune.teacher=ema: a moving average teaches pretraining only "
                "(objective.teacher). Give a fine-tuned run, its export or a public classifier."
            )
        if self.finetune.head_lrs and (self.optim.clip or self.train.precision == "fp16"):
            raise UserError(
                "finetune.head_lrs trains each head as if it were alone, but optim.clip and the "
                "loss scale of train.precision=fp16 are common. Set optim.clip=0 and "
                "train.precision=bf16 or fp32."
            )
        batch, views = self.evaluation.batch, self.evaluation.views
        if batch < math.prod(views):
            raise UserError(
                f"evaluation.batch={batch} is smaller than evaluation.views={list(views)}: the "
                f"views of a video stay together. Raise it to {math.prod(views)}."
            )
        return self
