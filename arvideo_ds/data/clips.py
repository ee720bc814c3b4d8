"""One video to its clips: place in the order -> bytes -> frames -> augmented clips."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from arvideo_ds.config import Recipe
from arvideo_ds.config.schema import DataSettings
from arvideo_ds.data.augment import Augment
from arvideo_ds.data.decoders import DecodeError, choose_decoder, decode
from arvideo_ds.data.manifest import AlteredError, IndexedSample, ShardSet
from arvideo_ds.data.order import Place, SampleOrder
from arvideo_ds.data.sampling import train_frames, view_frames
from arvideo_ds.data.transforms import Crop, cut, multi_scale_crop, random_resized_crop, view_crop
from arvideo_ds.data.watch import Watch
from arvideo_ds.errors import UserError
from arvideo_ds.randomness import clip_generator, draw_key

NO_LABEL = -1
# Data sets whose labels depend on left and right, and that are sampled over their whole length.
NEVER_FLIPPED = frozenset({"ssv2"})
SAMPLED_UNIFORMLY = frozenset({"ssv2"})


@dataclass(frozen=True)
class Skipped:
    """A video that did not decode while training."""

    key: str
    kind: str
    message: str


@dataclass(frozen=True)
class VideoClips:
    """K clips of one video, each F h w 3, uint8, with the model's key of each."""

    clips: list[Tensor]
    keys: list[int]
    label: int
    skipped: Skipped | None = None


class TrainClips(Dataset[VideoClips]):
    """Run position -> augmented clips of one video; all draws are functions of the position."""

    def __init__(
        self,
        shards: ShardSet,
        recipe: Recipe,
        *,
        num_workers: int = 0,
        left_out: Mapping[str, str] | None = None,
    ) -> None:
        data = recipe.data
        require_protocol(shards, data)
        self.shards, self.data, self.seed = shards, data, recipe.train.seed
        # Keys of videos that are not even tried, and why.
        self.left_out = dict(left_out or {})
        self.watch = Watch(num_workers)
        self.decoder = choose_decoder(data.decoder)
        self.augment = Augment(data)
        self.order = SampleOrder(
            [shard.samples for shard in shards.manifest.shards],
            seed=self.seed,
            num_streams=data.num_streams,
            window_shards=data.window_shards,
        )

    def __getitem__(self, run_position: int) -> VideoClips:
        with self.watch.on(run_position):
            return self._clips(run_position)

    def sample(self, run_position: int) -> tuple[Place, IndexedSample]:
        """Where a position lands, and the video there."""
        place = self.order.place(run_position)
        return place, self.shards.index(place.shard).samples[place.member]

    def _clips(self, run_position: int) -> VideoClips:
        data = self.data
        place, sample = self.sample(run_position)
        keys = [
            draw_key(self.seed, place.epoch, place.position, repeat)
            for repeat in range(data.repeats)
        ]
        # The K clips share one decode: the same frames, different crops (VideoMAE V2).
        generator = clip_generator(self.seed, place.epoch, place.position, 0)
        wanted = train_frames(sample.num_frames, data.frames, data.stride, data.sampling, generator)
        try:
            if sample.key in self.left_out:
                raise DecodeError(self.left_out[sample.key], "left out: see an earlier start")
            frames = decoded(self.shards, self.decoder, place.shard, sample, wanted)
        except DecodeError as error:
            black = [black_clip(data)] * data.repeats
            return VideoClips(black, keys, _label(sample), _skipped(sample, error))
        height, width = frames.shape[1:3]
        clips = []
        for repeat in range(data.repeats):
            generator = clip_generator(self.seed, place.epoch, place.position, 1 + repeat)
            crop = random_crop(height, width, data, generator)
            flip = data.flip and bool(generator.integers(2))
            clip = cut(frames, crop, data.size, flip=flip)
            clips.append(self.augment(clip, int(generator.integers(2**63))))
        return VideoClips(clips, keys, _label(sample))


class EvaluationClips(Dataset[VideoClips]):
    """Sample number -> its test views; every sample once, in the order of the shards.

    views: temporal x spatial; (1, 1) is the central clip. `VideoClips.keys` are the sample number,
    once for each view, temporal views outermost.
    """

    def __init__(
        self, shards: ShardSet, recipe: Recipe, *, views: tuple[int, int] = (1, 1)
    ) -> None:
        require_protocol(shards, recipe.data)
        self.shards, self.data, self.views = shards, recipe.data, views
        self.decoder = choose_decoder(recipe.data.decoder)
        self.places = [
            (number, member)
            for number, shard in enumerate(shards.manifest.shards)
            for member in range(shard.samples)
        ]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> VideoClips:
        shard, member = self.places[number]
        sample = self.shards.index(shard).samples[member]
        data, (temporal, spatial) = self.data, self.views
        keys = [number] * (temporal * spatial)
        wanted = [
            view_frames(sample.num_frames, data.frames, data.stride, data.sampling, view, temporal)
            for view in range(temporal)
        ]
        try:
            frames = decoded(self.shards, self.decoder, shard, sample, np.concatenate(wanted))
        except DecodeError as error:
            return VideoClips(
                [black_clip(data)] * len(keys), keys, _label(sample), _skipped(sample, error)
            )
        height, width = frames.shape[1:3]
        crops = [view_crop(height, width, data.size, view, spatial) for view in range(spatial)]
        clips = [
            cut(clip, crop, data.size, flip=False)
            for clip in np.split(frames, temporal)
            for crop in crops
        ]
        return VideoClips(clips, keys, _label(sample))


def decoded(
    shards: ShardSet, decoder: str, shard: int, sample: IndexedSample, wanted: np.ndarray
) -> np.ndarray:
    """Frames F H W 3 of a video. Errors: `DecodeError`, also where the shard was altered."""
    try:
        return decode(decoder, shards.read(shard, sample), wanted)
    except AlteredError as error:
        raise DecodeError("altered", str(error)) from None


def require_protocol(shards: ShardSet, data: DataSettings) -> None:
    """Errors: `UserError` where the settings break what the data set's labels mean."""
    dataset = shards.manifest.dataset
    if data.flip and dataset in NEVER_FLIPPED:
        raise UserError(
            f"data.flip=true, but {shards.name} is {dataset}, whose labels tell left from right. "
            "Set data.flip: false."
        )
    if data.sampling != "uniform" and dataset in SAMPLED_UNIFORMLY:
        raise UserError(
            f"data.sampling={data.sampling}, but {shards.name} is {dataset}, whose labels need "
            "the whole video. Set data.sampling: uniform."
        )


def random_crop(
    height: int, width: int, data: DataSettings, generator: np.random.Generator
) -> Crop:
    """The training crop of a frame, as data.crop says."""
    if data.crop == "random_resized":
        return random_resized_crop(height, width, data.crop_area, generator)
    return multi_scale_crop(height, width, data.size, data.crop_scales, generator)


def black_clip(data: DataSettings) -> Tensor:
    """What stands for a clip that did not decode."""
    return torch.zeros(data.frames, *data.size, 3, dtype=torch.uint8)


def _label(sample: IndexedSample) -> int:
    return NO_LABEL if sample.label is None else sample.label


def _skipped(sample: IndexedSample, error: DecodeError) -> Skipped:
    return Skipped(sample.key, error.kind, error.message)
