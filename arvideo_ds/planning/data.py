"""What the data must deliver for a planned rate of training: decoding, reading, storage."""

from __future__ import annotations

from dataclasses import dataclass

from arvideo_ds.config import Recipe

# Clips/s of one core, by clips cut from each decoded video: docs/benchmarks/README.md (clips of
# 16 x 224 x 224 from Kinetics at 340 x 256, torchcodec).
_MEASURED = {1: 55, 4: 139}
_MEASURED_FRAMES = 16


@dataclass(frozen=True)
class Supply:
    """Over all GPUs. rate_per_core: clips/s. read and stored bytes: None where no shards exist.

    cores: of all ranks together, if known.
    """

    clips_per_s: float
    rate_per_core: float
    read_bytes_per_s: float | None
    stored_bytes: int | None
    cores: int | None

    @property
    def decode_cores(self) -> float:
        return self.clips_per_s / self.rate_per_core

    @property
    def suffices(self) -> bool:
        return self.cores is None or self.cores >= self.decode_cores


def assumed_rate(recipe: Recipe) -> float:
    """Clips/s that a core decodes, from a measurement; decoding takes time by frames."""
    clips = max(count for count in _MEASURED if count <= recipe.data.repeats)
    return _MEASURED[clips] * _MEASURED_FRAMES / recipe.data.frames


def supply(
    recipe: Recipe,
    clips_per_s: float,
    *,
    num_videos: int,
    stored_bytes: int | None,
    rate_per_core: float | None,
    cores: int | None,
) -> Supply:
    """What training at this rate needs. stored_bytes: of all shards, with `num_videos`."""
    read = None
    if stored_bytes is not None:
        read = clips_per_s / recipe.data.repeats * stored_bytes / num_videos
    return Supply(clips_per_s, rate_per_core or assumed_rate(recipe), read, stored_bytes, cores)
