"""The recipe of pretraining; the objectives are in objectives.py."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, ValidationError, model_serializer, model_validator
from typing_extensions import Self

from arvideo_ds.config.objectives import (
    ArvideoSettings,
    DecoderSettings,
    ObjectiveSettings,
    TokenCounts,
)
from arvideo_ds.config.phases import PhaseSettings
from arvideo_ds.config.settings import Positive, Settings
from arvideo_ds.config.sizes import DecoderShape, TeacherShape, Transformer
from arvideo_ds.config.sources import EXCLUSIVE
from arvideo_ds.config.teachers import EMA
from arvideo_ds.config.transfer import StartRecipe, StartSettings
from arvideo_ds.errors import UserError
from arvideo_ds.geometry import Geometry, Triple


class ProbeSettings(Settings):
    """Labelled shards on which `arvideo probe` evaluates the frozen encoder, and the features."""

    # Not validated here: a run can be used without the plugin that has its pooling.
    features: str = "mean"
    """How a clip's tokens become one vector (`POOLINGS` in evaluation/probes.py): mean; change, the
    mean of the later half of the times less that of the earlier half, which removes what does not
    move; course, the means of 8 time spans less the total mean, concatenated; motion, the mean
    absolute change of a token from one time to the next."""
    clips: Positive = 1
    """Clips per video, evenly spread, whose features are averaged; 1: the central clip."""
    train_shards: str | None = None
    """Labelled shards on which probes are fitted."""
    test_shards: str | None = None
    """Labelled shards, with the same labels, on which probes are tested."""
    every_epochs: Annotated[float, Field(gt=0)] | None = None
    """Epochs between nearest-neighbour probes while training, on both shards; null: never."""


class PretrainRecipe(StartRecipe):
    """A pretraining run, without labels, from scratch or from other weights."""

    purpose: ClassVar[str] = "pretrain"
    script: ClassVar[str] = "pretrain"
    run_name: ClassVar[str] = "a pretraining run"
    tested_by: ClassVar[str] = "probe"
    teacher_section: ClassVar[str] = "objective"

    task: Literal["pretrain"] = "pretrain"
    objective: ObjectiveSettings = ArvideoSettings()
    decoder: DecoderSettings = DecoderSettings()
    pretrain: StartSettings = StartSettings()
    probe: ProbeSettings = ProbeSettings()
    phases: tuple[PhaseSettings, ...] | None = None
    """Parts of the run with clips, clusters or batches of their own; the last is as the recipe."""

    # In the recipe of a phase: the clip of the recipe itself.
    _whole_clip: Triple | None = PrivateAttr(default=None)

    @property
    def phase_shares(self) -> tuple[float, ...]:
        return tuple(p.share for p in self.phases) if self.phases else super().phase_shares

    def by_phase(self) -> list[Self]:
        return [self._during(phase) for phase in self.phases] if self.phases else [self]

    def _during(self, phase: PhaseSettings) -> Self:
        tree = self.model_dump(exclude={"phases"})
        for section, own in phase.own.items():
            replaced = EXCLUSIVE if EXCLUSIVE & own.keys() else frozenset[str]()
            kept = {key: value for key, value in tree[section].items() if key not in replaced}
            tree[section] = {**kept, **own}
        recipe = type(self).model_validate(tree)
        recipe._whole_clip = self.clip
        return recipe

    @property
    def pretrained_clip(self) -> Triple | None:
        """In a phase that of the recipe itself, so that a place keeps its position."""
        return super().pretrained_clip or self._whole_clip

    @property
    def whole_grid(self) -> Triple | None:
        """In a phase: the token grid of the recipe itself."""
        clip = self._whole_clip
        return None if clip is None else Geometry.whole(clip, self.patch).grid

    @property
    def geometry(self) -> Geometry:
        return self.objective.geometry(self.clip, self.patch)

    @property
    def counts(self) -> TokenCounts:
        counts = self.objective.counts(self.geometry, self.decoder)
        if self.objective.aligned:
            return replace(counts, decoded=0, predicted=counts.encoded)
        return counts

    @property
    def needs_scores(self) -> bool:
        return self.objective.needs_scores(self.decoder)

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
    def decoder_shape(self) -> DecoderShape | None:
        return None if self.objective.aligned else self._decoder_settled

    @property
    def _decoder_settled(self) -> DecoderShape:
        return self.objective.decoder_shape(self.size, self.decoder)

    @property
    def decoding(self) -> tuple[object, ...]:
        objective = self.objective
        features = objective.teacher is not None
        targets = objective.name, features, self.target_values, objective.normalize_targets
        return *targets, self.decoder_shape

    @property
    def transformer(self) -> Transformer:
        teacher = self.objective.teacher_shape
        return Transformer(
            self.size,
            self.model.size,
            decoder=self.decoder_shape,
            masked=self._decoder_settled.crosses,
            outputs=self.target_values,
            teacher=None
            if teacher is None
            else TeacherShape(teacher, self.geometry, aligned=self.objective.aligned),
        )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        geometry, decoder = self.geometry, self._decoder_settled
        self.objective.check(geometry, self.decoder)
        if decoder.width % decoder.heads or decoder.width % 2:
            raise UserError(
                f"decoder.width {decoder.width} must be even and a multiple of decoder.heads "
                f"{decoder.heads}."
            )
        if self.phases and self.teacher is not None:
            raise UserError(
                f"objective.teacher={self.teacher} does not go with phases: its features are of "
                "clips of one shape. Remove one of them."
            )
        if self.probe.features in ("change", "course", "motion") and geometry.grid[0] < 2:
            raise UserError(
                f"probe.features={self.probe.features} compares later times with earlier ones, but "
                f"data.frames={self.data.frames} gives only one time. Set probe.features: mean."
            )
        if self.phases is not None:
            self._check_phases(self.phases)
        return self

    def _check_phases(self, phases: tuple[PhaseSettings, ...]) -> None:
        if len(phases) < 2:
            raise UserError("phases needs two or more of them. Remove it for a run without phases.")
        if not math.isclose(total := sum(self.phase_shares), 1, abs_tol=1e-6):
            raise UserError(f"the shares of phases add up to {total:g}; they must add up to 1.")
        for number, phase in enumerate(phases):
            try:
                self._check_phase(phase)
            except (UserError, ValidationError) as error:
                raise UserError(f"phases.{number}: {_reason(error)}") from None
        whole, last = self.model_dump(), self._during(phases[-1]).model_dump()
        changed = [
            f"{section}.{key}={last[section][key]}"
            for section, own in phases[-1].own.items()
            for key in own
            if last[section][key] != whole[section].get(key)
        ]
        if changed:
            raise UserError(
                "the last of phases must be as the recipe itself, whose clips probes and exports "
                f"use, but it sets {', '.join(changed)}. Set that in the recipe."
            )

    def _check_phase(self, phase: PhaseSettings) -> None:
        own = {f"{section}.{key}" for section, keys in phase.own.items() for key in keys}
        if "objective.name" in own:
            raise UserError("objective.name is the same in all phases. Remove it.")
        if self.data.scores is not None and any(key.startswith("data.") for key in own):
            raise UserError(
                "data.scores are of tokens of one size, and this phase has clips of its own. "
                "Remove data.scores, or the phase's data.*."
            )
        if self.data.sources is not None and own & {"data.stride", "data.fps"}:
            raise UserError(
                "data.sources have strides of their own. Remove data.stride and data.fps here."
            )
        _ = self._during(phase)

    @model_serializer(mode="wrap")
    def _serialize(self, handler: Any) -> dict[str, Any]:
        """A recipe without phases has no such key."""
        tree: dict[str, Any] = handler(self)
        if self.phases is None:
            tree.pop("phases", None)
        return tree


def _reason(error: UserError | ValidationError) -> str:
    if isinstance(error, UserError):
        return str(error)
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
