"""The phases of a run (`phases`): parts with clips, clusters or batches of their own."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from arvideo_ds.config.settings import Positive, Settings


class PhaseData(Settings):
    """Clips of a phase."""

    frames: Positive | None = None
    """Replaces data.frames during this phase."""
    size: tuple[Positive, Positive] | None = None
    """Replaces data.size during this phase."""
    stride: Positive | None = None
    """Replaces data.stride and data.fps during this phase."""
    fps: Annotated[float, Field(gt=0)] | None = None
    """Replaces data.fps and data.stride during this phase."""

    @field_validator("size", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int | str) else value


class PhaseTrain(Settings):
    """Batches of a phase."""

    total_batch: Positive | None = None
    """Replaces train.total_batch during this phase."""
    micro_batch: Positive | None = None
    """Replaces train.micro_batch during this phase."""


class PhaseSettings(Settings):
    """A part of the run. A key that is null is as in the recipe; keys may be dotted, as in
    `data.size: 128`."""

    share: Annotated[float, Field(gt=0, lt=1)]
    """Share of the run's steps; those of all phases add up to 1."""
    data: PhaseData = PhaseData()
    train: PhaseTrain = PhaseTrain()
    objective: dict[str, Any] = Field(default_factory=dict)
    """Settings of the objective for this phase, such as `objective.cluster`; not its name."""

    @model_validator(mode="before")
    @classmethod
    def _sections(cls, tree: Any) -> Any:
        """Dotted keys as sections; a section's own key, as of an override, comes first."""
        if not isinstance(tree, dict):
            return tree
        nested = {key: value for key, value in tree.items() if "." not in str(key)}
        for dotted, value in tree.items():
            section, dot, key = str(dotted).partition(".")
            if dot and isinstance(nested.get(section, {}), dict):
                nested[section] = {key: value, **nested.get(section, {})}
        return nested

    @property
    def own(self) -> dict[str, dict[str, Any]]:
        """The settings that this phase overrides, by section."""
        tree = self.model_dump(exclude={"share"}, exclude_none=True)
        return {section: keys for section, keys in tree.items() if keys}
