"""The recipe of pretraining; its objective is in objectives.py."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from arvideo_ds.config.objectives import (
    ArvideoSettings,
    DecoderSettings,
    ObjectiveSettings,
    TokenCounts,
)
from arvideo_ds.config.schema import EncoderRecipe
from arvideo_ds.config.settings import Settings
from arvideo_ds.config.sizes import DecoderShape, Transformer
from arvideo_ds.errors import UserError
from arvideo_ds.geometry import Geometry


class ProbeSettings(Settings):
    """Labelled shards on which `arvideo probe` judges the frozen encoder, and by what.

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


class PretrainRecipe(EncoderRecipe):
    """A run that needs no labels."""

    purpose: ClassVar[str] = "pretrain"
    script: ClassVar[str] = "pretrain"
    run_name: ClassVar[str] = "a pretraining run"
    tested_by: ClassVar[str] = "probe"

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
    def needs_scores(self) -> bool:
        return self.objective.needs_scores(self.decoder)

    def notes(self) -> list[str]:
        return self.objective.notes(self.geometry)

    @property
    def target_values(self) -> int:
        """Numbers that the decoder predicts for each token."""
        return self.objective.target_values(self.geometry)

    @property
    def decoder_shape(self) -> DecoderShape:
        return self.objective.decoder_shape(self.size, self.decoder)

    @property
    def transformer(self) -> Transformer:
        return Transformer(
            self.size, self.model.size, decoder=self.decoder_shape, outputs=self.target_values
        )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        """Refuse contradictions between sections; errors name their keys."""
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
