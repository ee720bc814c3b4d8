"""The sources of a mixture (data.sources), and the settings of data that each may override."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import Field

from arvideo_ds.config.settings import Positive, Settings
from arvideo_ds.errors import UserError

Scale = Annotated[float, Field(gt=0, le=1)]
Sampling = Literal["dense", "uniform"]
CropName = Literal["multi_scale", "random_resized", "grid", "short_side"]

# A source that gives one of these replaces the others of data.
EXCLUSIVE = frozenset({"stride", "fps"})
# Settings of a source that override none of data.
IDENTITY = {"shards", "weight", "name", "num_videos"}
# The sequence of sources repeats after this number of videos at most.
LONGEST_PERIOD = 100_000


class SourceSettings(Settings):
    """One folder of shards of a mixture. A key that is null is as in `data`."""

    shards: str
    """Folder with manifest.json, or its URL."""
    weight: Annotated[float, Field(gt=0)]
    """Share of the training videos, relative to the other sources."""
    name: Annotated[str, Field(pattern=r"^[\w.+-]+$")] | None = None
    """Name of the source in messages and metrics; by default that of its data set."""
    num_videos: Positive | None = None
    """Number of videos that the plan assumes before the shards exist (a published count)."""
    stride: Positive | None = None
    """Replaces data.stride and data.fps for this source."""
    fps: Annotated[float, Field(gt=0)] | None = None
    """Replaces data.fps and data.stride for this source."""
    sampling: Sampling | None = None
    """Replaces data.sampling for this source."""
    crop: CropName | None = None
    """Replaces data.crop for this source."""
    crop_scales: Annotated[tuple[Scale, ...], Field(min_length=1)] | None = None
    """Replaces data.crop_scales for this source."""
    crop_area: tuple[Scale, Scale] | None = None
    """Replaces data.crop_area for this source."""
    short_side: Positive | None = None
    """Replaces data.short_side for this source."""
    flip: bool | None = None
    """Replaces data.flip for this source."""

    @property
    def own(self) -> dict[str, Any]:
        """The settings of data that this source overrides."""
        return self.model_dump(exclude=IDENTITY, exclude_none=True)


def whole_weights(sources: Sequence[SourceSettings]) -> tuple[int, ...]:
    """The weights as the smallest whole numbers of the same ratio: of as many videos as their sum,
    each source has its number. Errors: `UserError` where the sum is above `LONGEST_PERIOD`."""
    # As written: 0.1 is a tenth.
    exact = [Fraction(str(source.weight)) for source in sources]
    whole = [int(weight * math.lcm(*(w.denominator for w in exact))) for weight in exact]
    whole = [number // math.gcd(*whole) for number in whole]
    if sum(whole) > LONGEST_PERIOD:
        rounded = [max(1, round(1000 * weight / sum(exact))) for weight in exact]
        raise UserError(
            f"the weights of data.sources are {':'.join(map(str, whole))} in whole numbers. The "
            f"sequence of sources repeats after their sum, which may be {LONGEST_PERIOD} at most. "
            f"Round them, for example to {':'.join(map(str, rounded))}."
        )
    return tuple(whole)


def source_names(
    sources: Sequence[SourceSettings], datasets: Sequence[str] | None = None
) -> tuple[str, ...]:
    """A name for each source, all different: its own, else that of its data set, else of its
    folder; repeated ones are numbered."""
    names = [source.name for source in sources]
    for number, source in enumerate(sources):
        name = datasets[number] if datasets else PurePath(source.shards).name
        numbered = (f"{name}-{n}" if n > 1 else name for n in itertools.count(1))
        names[number] = names[number] or next(each for each in numbered if each not in names)
    return tuple(map(str, names))
