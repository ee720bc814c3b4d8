"""What the data must deliver for a planned rate of training: decoding, reading, storage."""

from __future__ import annotations

from dataclasses import dataclass

from arvideo_ds.config import Recipe
from arvideo_ds.config.schema import DataSettings

# Clips/s of one core by whether they start on the layer of the shards, and by the clips cut from
# each decoded video: docs/benchmarks/README.md (16 x 224 x 224 from Kinetics at 340 x 256).
_MEASURED = {False: {1: 78, 4: 139}, True: {1: 126, 4: 330}}
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


def on_layer(data: DataSettings, layers: int) -> bool:
    """Whether clips start on the layer of layered shards, and so decode fewer pictures."""
    if data.stride is None or data.sampling != "dense":
        return False
    return layers > 1 and data.stride % layers == 0


def layers_in_words(data: DataSettings, layers: int) -> list[str]:
    """Why clips decode more of layered shards than they need; nothing where they do not."""
    if layers == 1 or on_layer(data, layers):
        return []
    if data.sampling == "uniform":
        how = "data.sampling=uniform decodes others too"
    elif data.stride is None:
        how = "with data.fps it depends on the video"
    else:
        how = f"data.stride={data.stride} is not a multiple, so others are decoded too"
    return [f"only one frame in {layers} of the shards is one that others refer to; {how}."]


def assumed_rate(recipe: Recipe, layers: int) -> float:
    """Clips/s that a core decodes, from a measurement; decoding takes time by frames."""
    measured = _MEASURED[on_layer(recipe.data, layers)]
    repeats = 1 if recipe.data.segments else recipe.data.repeats
    clips = max(count for count in measured if count <= repeats)
    return measured[clips] * _MEASURED_FRAMES / recipe.data.frames


def supply(
    recipe: Recipe,
    clips_per_s: float,
    *,
    num_videos: int,
    stored_bytes: int | None,
    rate_per_core: float | None,
    cores: int | None,
    layers: int | None = None,
) -> Supply:
    """What training at this rate needs. stored_bytes: of all shards, with `num_videos`. layers: of
    the shards; None: as new shards of a data set with the recipe's stride have them."""
    read = None
    if stored_bytes is not None:
        read = clips_per_s / recipe.data.repeats * stored_bytes / num_videos
    rate = rate_per_core or assumed_rate(recipe, layers or recipe.data.stride or 1)
    return Supply(clips_per_s, rate, read, stored_bytes, cores)
