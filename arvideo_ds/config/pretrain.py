"""The recipe of pretraining; the objectives are in objectives.py."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from arvideo_ds.config.objectives import (
    EMA,
    ArvideoSettings,
    DecoderSettings,
    ObjectiveSettings,
    TokenCounts,
)
from arvideo_ds.config.settings import Positive, Settings
from arvideo_ds.config.sizes import DecoderShape, Transformer
from arvideo_ds.config.transfer import StartRecipe, StartSettings
from arvideo_ds.errors import UserError
from arvideo_ds.geometry import Geometry


class ProbeSettings(Settings):
    """Labelled shards on which `arvideo probe` evaluates the frozen encoder, and the features."""

    # Not validated here: a run can be used without the plugin that has its pooling.
    features: str = "mean"
    """How a clip's tokens become one vector (`POOLINGS` in evaluation/probes.py): mean; change, the
    mean of the later half of the times less that of the earlier half, which removes what does not
    move; course, the means of 8 time spans less the total mean, concatenated."""
    clips: Positive = 1
    """Clips per video, evenly spread, whose features are averaged; 1: the central clip."""
    train_shards: str | None = None
    test_shards: str | None = None
    every_epochs: Annotated[float, Field(gt=0)] | None = None
    """Epochs between nearest-neighbour probes while training, on both shards; None = never."""


class PretrainRecipe(StartRecipe):
    """A pretraining run, without labels, from scratch or from other weights."""

    purpose: ClassVar[str] = "pretrain"
    script: ClassVar[str] = "pretrain"
    run_name: ClassVar[str] = "a pretraining run"
    tested_by: ClassVar[str] = "probe"

    task: Literal["pretrain"] = "pretrain"
    objective: ObjectiveSettings = ArvideoSettings()
    decoder: DecoderSettings = DecoderSettings()
    pretrain: StartSettings = StartSettings()
    probe: ProbeSettings = ProbeSettings()

    @property
    def geometry(self) -> Geometry:
        return self.objective.geometry(self.clip, self.patch)

    @property
    def counts(self) -> TokenCounts:
        return self.objective.counts(self.geometry, self.decoder)

    @property
    def needs_scores(self) -> bool:
        return self.objective.needs_scores(self.decoder)

    @property
    def teacher(self) -> str | None:
        return self.objective.teacher

    @property
    def ema_decay(self) -> float | None:
        return self.objective.teacher_decay if self.teacher == EMA else None

    def notes(self) -> list[str]:
        return self.objective.notes(self.geometry)

    @property
    def target_values(self) -> int:
        """Values that the decoder predicts per token."""
        return self.objective.target_values(self.geometry)

    @property
    def decoder_shape(self) -> DecoderShape:
        return self.objective.decoder_shape(self.size, self.decoder)

    @property
    def decoding(self) -> tuple[object, ...]:
        objective = self.objective
        targets = objective.name, self.target_values, objective.normalize_targets
        return *targets, self.decoder_shape

    @property
    def transformer(self) -> Transformer:
        return Transformer(
            self.size,
            self.model.size,
            decoder=self.decoder_shape,
            outputs=self.target_values,
            teacher=self.objective.teacher_shape,
        )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        geometry, width, heads = self.geometry, self.decoder_shape.width, self.decoder_shape.heads
        self.objective.check(geometry, self.decoder)
        if width % heads or width % 2:
            raise UserError(
                f"decoder.width {width} must be even and a multiple of decoder.heads {heads}."
            )
        if self.probe.features in ("change", "course") and geometry.grid[0] < 2:
            raise UserError(
                f"probe.features={self.probe.features} compares later times with earlier ones, but "
                f"data.frames={self.data.frames} gives only one time. Set probe.features: mean."
            )
        return self
