"""One video to its clips: place in the order -> bytes -> frames -> augmented clips."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from arvideo_ds.config import Recipe
from arvideo_ds.config.schema import DataSettings
from arvideo_ds.data.augment import Augment
from arvideo_ds.data.order import Place, SampleOrder
from arvideo_ds.data.sampling import aligned_frames, train_frames, view_frames
from arvideo_ds.data.transforms import (
    Crop,
    cut,
    fit_to_grid,
    grid_crop,
    multi_scale_crop,
    random_resized_crop,
    short_side_crop,
    view_crop,
)
from arvideo_ds.data.watch import Watch
from arvideo_ds.decoding.decoders import DecodeError, choose_decoder, decode
from arvideo_ds.errors import UserError
from arvideo_ds.geometry import Triple
from arvideo_ds.randomness import clip_generator, draw_key
from arvideo_ds.shards.datasets import never_flipped, sampled_uniformly
from arvideo_ds.shards.manifest import AlteredError, IndexedSample, ShardSet, UnreachableError

NO_LABEL = -1
# Items of its stream by which a shard behind a URL is fetched before it is read.
_AHEAD = 32


@dataclass(frozen=True)
class Skipped:
    """A video that did not decode while training."""

    key: str
    kind: str
    message: str


class TokenValues(Protocol):
    """Values of the tokens of a video or of a part of it, on a grid t h w."""

    def over(self, first: int, times: int) -> TokenValues:
        """From time `first` on; may reach beyond the video's end."""

    def within(self, row: int, column: int, height: int, width: int) -> TokenValues:
        """A box of tokens."""

    def flat(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Scores N float32 and, where there are any, codes N int64, along (time, row, column)."""


class ScoreReader(Protocol):
    """What data.scores has of the tokens of every video of the shards (long_video/)."""

    def read(self, shard: int, key: str) -> TokenValues | None:
        """Values of a whole video; None where it has none. Errors: `AlteredError`."""

    def nothing(self, grid: Triple) -> TokenValues:
        """Zeros for a clip that did not decode."""


@dataclass(frozen=True)
class VideoClips:
    """K clips of one video, each F h w 3, uint8, with the model's key of each.

    label: its number, -1 where there is none; where the recipe has heads, the number of each.
    scores: of each clip's tokens, where the recipe has data.scores.
    """

    clips: list[Tensor]
    keys: list[int]
    label: int | tuple[int, ...]
    skipped: Skipped | None = None
    scores: list[TokenValues] | None = field(default=None, kw_only=True)


class TrainClips(Dataset[VideoClips]):
    """Run position -> augmented clips of one video; all draws are functions of the position.

    scores: of the tokens of these shards, where the recipe has data.scores. A clip's frames and
    place are then those of stored tokens, whose scores come along.
    """

    def __init__(
        self,
        shards: ShardSet,
        recipe: Recipe,
        *,
        num_workers: int = 0,
        left_out: Mapping[str, str] | None = None,
        scores: ScoreReader | None = None,
    ) -> None:
        data = recipe.data
        if (scores is None) != (data.scores is None):
            raise ValueError(f"data.scores={data.scores} must come with its reader")
        require_protocol(shards, recipe)
        self.shards, self.data, self.seed = shards, data, recipe.train.seed
        self.patch, self.grid = recipe.patch, recipe.geometry.grid
        self.scores = scores
        self.heads = recipe.heads
        # Keys of videos that are not even tried, and why.
        self.left_out = dict(left_out or {})
        self.watch = Watch(num_workers)
        self.decoder = choose_decoder(data.decoder)
        self.augment = Augment(data)
        self.order = SampleOrder(
            shards.samples_of_shards,
            seed=self.seed,
            num_streams=data.num_streams,
            window_shards=data.window_shards,
        )

    def __getitem__(self, run_position: int) -> VideoClips:
        with self.watch.on(run_position):
            self._fetch_ahead(run_position)
            return self._clips(run_position)

    def sample(self, run_position: int) -> tuple[Place, IndexedSample]:
        """Where a position lands, and the video there."""
        place = self.order.place(run_position)
        return place, self._sample(place)

    def key_at(self, run_position: int) -> str:
        """Key of the video there; where its index is out of reach, its shard and number in it."""
        place = self.order.place(run_position)
        try:
            return self._sample(place).key
        except UnreachableError:
            return self._unknown(place).key

    def _sample(self, place: Place) -> IndexedSample:
        return self.shards.index(place.shard).samples[place.member]

    def _unknown(self, place: Place) -> IndexedSample:
        """Stands for a video of whose index nothing could be read."""
        name = self.shards.manifest.shards[place.shard].name
        return IndexedSample(
            key=f"{name}#{place.member}",
            suffix="",
            offset=0,
            bytes=0,
            crc32=0,
            num_frames=1,
            label=None,
        )

    def _fetch_ahead(self, run_position: int) -> None:
        """The shard that the same stream, and so the same rank, reads a little later."""
        if self.shards.is_remote:
            later = run_position + _AHEAD * self.data.num_streams
            self.shards.fetch_ahead(self.order.place(later).shard)

    def _clips(self, run_position: int) -> VideoClips:
        data, place = self.data, self.order.place(run_position)
        keys = [
            draw_key(self.seed, place.epoch, place.position, repeat)
            for repeat in range(data.repeats)
        ]
        try:
            sample = self._sample(place)
        except UnreachableError as error:
            return self._undecoded(self._unknown(place), keys, unreachable(error))
        # The K clips share one decode: the same frames, different crops (VideoMAE V2).
        generator = clip_generator(self.seed, place.epoch, place.position, 0)
        wanted = self._wanted(sample.num_frames, generator)
        try:
            if sample.key in self.left_out:
                raise DecodeError(self.left_out[sample.key], "left out: see an earlier start")
            frames = decoded(self.shards, self.decoder, place.shard, sample, wanted)
            scores = self._scores(place.shard, sample, int(wanted[0]))
        except DecodeError as error:
            return self._undecoded(sample, keys, error)
        if data.crop == "grid":
            frames = fit_to_grid(frames, data.size, self.patch[1:])
        height, width = frames.shape[1:3]
        clips, crops = [], []
        for repeat in range(data.repeats):
            generator = clip_generator(self.seed, place.epoch, place.position, 1 + repeat)
            crop = random_crop(height, width, data, generator, self.patch[1:])
            flip = data.flip and bool(generator.integers(2))
            clip = cut(frames, crop, data.size, flip=flip)
            clips.append(self.augment(clip, int(generator.integers(2**63))))
            crops.append(crop)
        own = None if scores is None else [self._of_crop(scores, crop) for crop in crops]
        return VideoClips(clips, keys, _label(sample, self.heads), scores=own)

    def _wanted(self, num_frames: int, generator: np.random.Generator) -> np.ndarray:
        data = self.data
        if self.scores is None:
            return train_frames(num_frames, data.frames, data.stride, data.sampling, generator)
        start = generator.random()
        return aligned_frames(num_frames, data.frames, data.stride, self.patch[0], start)

    def _scores(self, shard: int, sample: IndexedSample, first_frame: int) -> TokenValues | None:
        """Scores of the clip's times, of the whole picture. Errors: `DecodeError`."""
        if self.scores is None:
            return None
        try:
            video = self.scores.read(shard, sample.key)
        except AlteredError as error:
            raise DecodeError("altered", str(error)) from None
        if video is None:
            raise DecodeError("unscored", "it was not readable when the shards were scored")
        return video.over(first_frame // (self.data.stride * self.patch[0]), self.grid[0])

    def _of_crop(self, scores: TokenValues, crop: Crop) -> TokenValues:
        (_, rows, columns), (_, high, wide) = self.grid, self.patch
        return scores.within(crop.top // high, crop.left // wide, rows, columns)

    def _undecoded(self, sample: IndexedSample, keys: list[int], error: DecodeError) -> VideoClips:
        black = [black_clip(self.data)] * len(keys)
        scores = None if self.scores is None else [self.scores.nothing(self.grid)] * len(keys)
        skipped = _skipped(sample, error)
        return VideoClips(black, keys, _label(sample, self.heads), skipped, scores=scores)


class EvaluationClips(Dataset[VideoClips]):
    """Sample number -> its test views; every sample once, in the order of the shards.

    views: temporal x spatial; (1, 1) is the central clip. `VideoClips.keys` are the sample number,
    once for each view, temporal views outermost.
    """

    def __init__(
        self, shards: ShardSet, recipe: Recipe, *, views: tuple[int, int] = (1, 1)
    ) -> None:
        require_protocol(shards, recipe)
        self.shards, self.data, self.views = shards, recipe.data, views
        self.heads = recipe.heads
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
            black, label = [black_clip(data)] * len(keys), _label(sample, self.heads)
            return VideoClips(black, keys, label, _skipped(sample, error))
        height, width = frames.shape[1:3]
        crops = [view_crop(height, width, data.size, view, spatial) for view in range(spatial)]
        clips = [
            cut(clip, crop, data.size, flip=False)
            for clip in np.split(frames, temporal)
            for crop in crops
        ]
        return VideoClips(clips, keys, _label(sample, self.heads))


def decoded(
    shards: ShardSet, decoder: str, shard: int, sample: IndexedSample, wanted: np.ndarray
) -> np.ndarray:
    """Frames F H W 3 of a video. Errors: `DecodeError`, also where the shard was altered, or is
    out of reach."""
    try:
        return decode(decoder, shards.read(shard, sample), wanted)
    except UnreachableError as error:
        raise unreachable(error) from None
    except AlteredError as error:
        raise DecodeError("altered", str(error)) from None


def unreachable(error: UnreachableError) -> DecodeError:
    """While training, a video out of reach is one that does not decode."""
    return DecodeError("unreachable", str(error))


def require_protocol(shards: ShardSet, recipe: Recipe) -> None:
    """Errors: `UserError` where the settings break what the data set's labels mean.

    The rules of one data set hold for all shards that it was merged into. Flips are refused for
    every task; uniform sampling is required where labels are learnt.
    """
    data = recipe.data
    if data.flip and (found := never_flipped(shards.manifest)):
        raise UserError(
            f"data.flip=true, but {shards.name} {_holds(shards, found)}, whose labels tell left "
            "from right. Set data.flip: false."
        )
    found = sampled_uniformly(shards.manifest)
    if recipe.learns_labels and data.sampling != "uniform" and found:
        raise UserError(
            f"data.sampling={data.sampling}, but {shards.name} {_holds(shards, found)}, whose "
            "labels need the whole video. Set data.sampling: uniform."
        )


def for_labels(shards: ShardSet, recipe: Recipe) -> Recipe:
    """The recipe with which an encoder is judged by the labels of these shards.

    Pretraining may sample a data set differently from what its labels need; a probe may not.
    """
    if recipe.learns_labels or not sampled_uniformly(shards.manifest):
        return recipe
    return recipe.model_copy(
        update={"data": recipe.data.model_copy(update={"sampling": "uniform"})}
    )


def _holds(shards: ShardSet, found: Iterable[str]) -> str:
    name = " and ".join(sorted(found))
    return f"is {name}" if shards.manifest.dataset == name else f"has samples of {name}"


def random_crop(
    height: int,
    width: int,
    data: DataSettings,
    generator: np.random.Generator,
    patch: tuple[int, int] = (1, 1),
) -> Crop:
    """The training crop of a frame, as data.crop says; patch: rows and columns of "grid"."""
    if data.crop == "grid":
        return grid_crop(height, width, data.size, patch, generator)
    if data.crop == "random_resized":
        return random_resized_crop(height, width, data.crop_area, generator)
    if data.crop == "short_side":
        return short_side_crop(height, width, data.size, data.short_side, generator)
    return multi_scale_crop(height, width, data.size, data.crop_scales, generator)


def black_clip(data: DataSettings) -> Tensor:
    """What stands for a clip that did not decode."""
    return torch.zeros(data.frames, *data.size, 3, dtype=torch.uint8)


def _label(sample: IndexedSample, heads: tuple[str, ...] | None) -> int | tuple[int, ...]:
    if heads is None:
        return NO_LABEL if sample.label is None else sample.label
    known = sample.labels_by_set or {}
    return tuple(known.get(name, NO_LABEL) for name in heads)


def _skipped(sample: IndexedSample, error: DecodeError) -> Skipped:
    return Skipped(sample.key, error.kind, error.message)
