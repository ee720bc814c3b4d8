"""One video to its clips: place in the order -> bytes -> frames -> augmented clips."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from arvideo_ds.config import Recipe
from arvideo_ds.data.augment import Augment
from arvideo_ds.data.order import Place, SampleOrder, SourceOrder
from arvideo_ds.data.planes import NO_COLOUR, cut_planes
from arvideo_ds.data.sampling import aligned_frames, train_frames, view_frames
from arvideo_ds.data.transforms import Crop, cut, fit_to_grid, random_crop, view_crop
from arvideo_ds.decoding.decoders import (
    DecodeError,
    choose_decoder,
    decode,
    decode_planes,
    read_frame_rate,
)
from arvideo_ds.errors import UserError
from arvideo_ds.geometry import Triple
from arvideo_ds.randomness import clip_generator, draw_key, source_seed
from arvideo_ds.shards.datasets import never_flipped, sampled_uniformly
from arvideo_ds.shards.manifest import AlteredError, IndexedSample, ShardSet, UnreachableError
from arvideo_ds.shards.mix import ShardMix

NO_LABEL = -1
# A shard behind a URL is fetched so many items of its stream before it is read.
_AHEAD = 32
_IDLE = -1


@dataclass(frozen=True)
class Skipped:
    """A video that did not decode."""

    key: str
    kind: str
    message: str


class TokenValues(Protocol):
    """Values of the tokens of a video, or of a part of it, on a grid t h w."""

    def over(self, first: int, times: int) -> TokenValues:
        """`times` rows from time `first`; may exceed the video's end."""

    def within(self, row: int, column: int, height: int, width: int) -> TokenValues:
        """A box of tokens."""

    def flat(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Scores N float32 and codes N int64, if any, along (time, row, column)."""


class ScoreReader(Protocol):
    """The stored scores of data.scores (long_video/)."""

    def read(self, shard: int, key: str) -> TokenValues | None:
        """Values of a whole video, None if it has none. Errors: `AlteredError`."""

    def nothing(self, grid: Triple) -> TokenValues:
        """Zeros for a clip that did not decode."""


@dataclass(frozen=True)
class VideoClips:
    """K clips of one video, each F h w 3, uint8, with the model's key of each. label: its number,
    -1 if it has none; with heads, the number for each head. scores: of each clip's tokens, with
    data.scores."""

    clips: list[Tensor]
    keys: list[int]
    label: int | tuple[int, ...]
    skipped: Skipped | None = None
    scores: list[TokenValues] | None = field(default=None, kw_only=True)


class _Clips(Dataset[VideoClips]):
    """What clips for training and for tests share."""

    def __init__(self, shards: ShardSet, recipe: Recipe) -> None:
        require_protocol(shards, recipe)
        self.shards, self.data, self.heads = shards, recipe.data, recipe.heads
        self.patch, self.grid = recipe.patch, recipe.geometry.grid
        self.decoder = choose_decoder(recipe.data.decoder, layers=shards.layers)
        self.planes = False

    def frames(self, shard: int, sample: IndexedSample, numbers: np.ndarray) -> np.ndarray:
        """Frames F H W 3 of these numbers, or F 3H/2 W as planes. Errors: `DecodeError`, also for a
        shard that was altered or is unreachable."""
        with _decode_errors():
            data = self.shards.read(shard, sample)
            if self.planes:
                return decode_planes(data, numbers)
            return decode(self.decoder, data, numbers)

    def frame_size(self, frames: np.ndarray) -> tuple[int, int]:
        """Height and width of `frames`."""
        height, width = frames.shape[1:3]
        return height * 2 // 3 if self.planes else height, width

    def stride(self, shard: int, sample: IndexedSample) -> float:
        """Frames of the video from one of a clip to the next. Errors: as `frames`."""
        if self.data.stride is not None:
            return self.data.stride
        with _decode_errors():
            return self.data.stride_at(read_frame_rate(self.shards.read(shard, sample)))

    def _label(self, sample: IndexedSample) -> int | tuple[int, ...]:
        if self.heads is None:
            return NO_LABEL if sample.label is None else sample.label
        return tuple((sample.labels_by_set or {}).get(name, NO_LABEL) for name in self.heads)

    def _black(self, sample: IndexedSample, keys: list[int], error: DecodeError) -> VideoClips:
        """The clips of a video that did not decode."""
        clips = [torch.zeros(self.data.frames, *self.data.size, 3, dtype=torch.uint8)] * len(keys)
        skipped = Skipped(sample.key, error.kind, error.message)
        return VideoClips(clips, keys, self._label(sample), skipped)


class Watch:
    """The run position of each worker and since when, in shared memory: a worker that hangs in
    native code or died cannot report it."""

    def __init__(self, num_workers: int) -> None:
        self._lines = torch.full((max(1, num_workers), 2), _IDLE, dtype=torch.int64)
        self._lines.share_memory_()

    @contextmanager
    def on(self, position: int) -> Iterator[None]:
        """Around the work on one position, in the worker."""
        worker = get_worker_info()
        line = self._lines[0 if worker is None else worker.id]
        line[1] = time.monotonic_ns()
        line[0] = position
        yield
        line[0] = _IDLE

    def position(self, worker: int) -> int | None:
        """The last position of a worker, None if it completed it."""
        position = int(self._lines[worker, 0])
        return None if position == _IDLE else position

    def longest(self) -> int | None:
        """The worker that has been on one position for the longest time."""
        return min(self.busy(), key=lambda worker: int(self._lines[worker, 1]), default=None)

    def busy(self) -> list[int]:
        """The workers that are on a position."""
        return [w for w in range(len(self._lines)) if self.position(w) is not None]


class TrainClips(_Clips):
    """Run position -> augmented clips of one video; all draws are functions of the position.

    left_out: keys of videos that are not decoded, with the kind of their earlier failure. scores:
    of these shards, with data.scores; frames and crops are then aligned with the stored tokens.
    Errors: `UserError`, as `require_protocol`.
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
        super().__init__(shards, recipe)
        data = recipe.data
        if (scores is None) != (data.scores is None):
            raise ValueError(f"data.scores={data.scores} must come with its reader")
        self.seed, self.scores, self.planes = recipe.train.seed, scores, data.planes
        if self.planes:
            self.decoder = "pyav"  # whatever the ranks share
        self.left_out = dict(left_out or {})
        self.watch = Watch(num_workers)
        self.augment, self.cut = Augment(data), cut_planes if data.planes else cut
        self.order = SampleOrder(
            shards.samples_of_shards,
            seed=self.seed,
            num_streams=data.num_streams,
            window_shards=data.window_shards,
        )

    def __getitem__(self, run_position: int) -> VideoClips:
        with self.watch.on(run_position):
            return self.at(run_position)

    def at(self, run_position: int) -> VideoClips:
        """The clips of a run position, without recording it in `watch`."""
        if self.shards.is_remote:
            # The shard that this stream, and so this rank, reads a little later.
            later = run_position + _AHEAD * self.data.num_streams
            self.shards.fetch_ahead(self.order.place(later).shard)
        return self._clips(self.order.place(run_position))

    def videos_by_source(self, run_position: int) -> dict[str, int]:  # noqa: ARG002
        """Videos before a run position, by source; empty without a mixture."""
        return {}

    def sample(self, run_position: int) -> tuple[Place, IndexedSample]:
        """Place and video of a run position. Errors: `UnreachableError`."""
        place = self.order.place(run_position)
        return place, self._sample(place)

    def key_at(self, run_position: int) -> str:
        """Key of the video there; if its index is unreachable, its shard and number in it."""
        try:
            return self.sample(run_position)[1].key
        except UnreachableError:
            return self._unknown(self.order.place(run_position)).key

    def _sample(self, place: Place) -> IndexedSample:
        return self.shards.index(place.shard).samples[place.member]

    def _unknown(self, place: Place) -> IndexedSample:
        """Placeholder for a video whose index is unreachable."""
        key = f"{self.shards.manifest.shards[place.shard].name}#{place.member}"
        return IndexedSample(
            key=key, suffix="", offset=0, bytes=0, crc32=0, num_frames=1, label=None
        )

    def _clips(self, place: Place) -> VideoClips:
        draw = self.seed, place.epoch, place.position
        keys = [draw_key(*draw, repeat) for repeat in range(self.data.repeats)]
        sample = None
        try:
            with _decode_errors():
                sample = self._sample(place)
                if sample.key in self.left_out:
                    raise DecodeError(self.left_out[sample.key], "excluded after a failure")
                return self._decoded(place, sample, keys)
        except DecodeError as error:
            return self._black(sample or self._unknown(place), keys, error)

    def _decoded(self, place: Place, sample: IndexedSample, keys: list[int]) -> VideoClips:
        """Errors: `DecodeError`, and those that `decode_errors` translates."""
        data, patch = self.data, self.patch
        # The K clips share one decode: the same frames, different crops (VideoMAE V2); with
        # data.segments, K times as many frames.
        generator = clip_generator(self.seed, place.epoch, place.position, 0)
        num_frames, frames = sample.num_frames, data.frames
        stride = self.stride(place.shard, sample)
        parts = data.repeats if data.segments else 1
        if self.scores is None:
            settings = (num_frames, frames, stride, data.sampling, generator, self.shards.layers)
            numbers = np.concatenate([train_frames(*settings, (n, parts)) for n in range(parts)])
        else:
            stride = int(stride)  # data.scores refuses data.fps
            numbers = aligned_frames(num_frames, frames, stride, patch[0], generator.random())
        pictures = self.frames(place.shard, sample, numbers)
        if data.crop == "grid":
            pictures = fit_to_grid(pictures, data.size, patch[1:])
        of_repeats = np.split(pictures, parts) * (data.repeats // parts)
        made = [self._cropped(clip, place, repeat) for repeat, clip in enumerate(of_repeats)]
        scores = None
        if self.scores is not None:
            video = self.scores.read(place.shard, sample.key)
            if video is None:
                raise DecodeError("unscored", "it was not readable when the shards were scored")
            times, rows, columns = self.grid
            clip = video.over(int(numbers[0] // (stride * patch[0])), times)
            scores = [
                clip.within(crop.top // patch[1], crop.left // patch[2], rows, columns)
                for _, crop, *_ in made
            ]
        return VideoClips([clip for clip, *_ in made], keys, self._label(sample), scores=scores)

    def _cropped(
        self, frames: np.ndarray, place: Place, repeat: int
    ) -> tuple[Tensor, Crop, bool, Generator]:
        """A clip, its crop, whether it is flipped, and the generator for further draws."""
        data = self.data
        generator = clip_generator(self.seed, place.epoch, place.position, 1 + repeat)
        height, width = self.frame_size(frames)
        crop = random_crop(height, width, data, self.patch[1:], generator)
        flip = data.flip and bool(generator.integers(2))
        clip = self.cut(frames, crop, data.size, flip=flip)
        return self.augment(clip, int(generator.integers(2**63))), crop, flip, generator

    def _black(self, sample: IndexedSample, keys: list[int], error: DecodeError) -> VideoClips:
        clips = super()._black(sample, keys, error)
        if self.planes:
            (rows, columns), count = self.data.size, self.data.frames
            black = torch.zeros(count, rows * 3 // 2, columns, dtype=torch.uint8)
            black[:, rows:] = NO_COLOUR
            clips = replace(clips, clips=[black] * len(keys))
        if self.scores is None:
            return clips
        return replace(clips, scores=[self.scores.nothing(self.grid)] * len(keys))


class MixedClips(Dataset[VideoClips]):
    """Run position -> clips of a video of the source that the position belongs to, made as if this
    source were alone, with a seed of its own. Keys are SOURCE:KEY. Errors: `UserError`, as
    `require_protocol`, with the source."""

    def __init__(
        self,
        shards: ShardMix,
        recipe: Recipe,
        *,
        num_workers: int = 0,
        left_out: Mapping[str, str] | None = None,
    ) -> None:
        self.names, self.order = shards.names, SourceOrder(shards.weights)
        self.watch, self.left_out = Watch(num_workers), dict(left_out or {})
        self.sources = [
            _SourceClips(shards, alone, number, self.left_out)
            for number, alone in enumerate(recipe.by_source())
        ]
        self.decoder = self.sources[0].decoder

    def __getitem__(self, run_position: int) -> VideoClips:
        with self.watch.on(run_position):
            source, position = self.order.place(run_position)
            return self.sources[source].at(position)

    def key_at(self, run_position: int) -> str:
        """As `TrainClips.key_at`, with the source."""
        source, position = self.order.place(run_position)
        return self.sources[source].key_at(position)

    def videos_by_source(self, run_position: int) -> dict[str, int]:
        """Videos before a run position, by source."""
        return dict(zip(self.names, self.order.counts(run_position), strict=True))


class _SourceClips(TrainClips):
    """Clips of one source of a mixture. recipe: `by_source`. left_out: shared by the sources."""

    def __init__(
        self, mix: ShardMix, recipe: Recipe, number: int, left_out: dict[str, str]
    ) -> None:
        self.name = mix.names[number]
        seed = source_seed(recipe.train.seed, number)
        train = recipe.train.model_copy(update={"seed": seed})
        try:
            super().__init__(mix.sets[number], recipe.model_copy(update={"train": train}))
        except UserError as error:
            raise UserError(f"data.sources.{number} ({self.name}): {error}") from None
        self.left_out = left_out

    def _sample(self, place: Place) -> IndexedSample:
        return self._qualified(super()._sample(place))

    def _unknown(self, place: Place) -> IndexedSample:
        return self._qualified(super()._unknown(place))

    def _qualified(self, sample: IndexedSample) -> IndexedSample:
        return sample.model_copy(update={"key": f"{self.name}:{sample.key}"})


class EvaluationClips(_Clips):
    """Sample number -> its test views; every sample once, in the order of the shards. views:
    temporal x spatial; (1, 1) is the central clip. `VideoClips.keys` repeat the sample number for
    each view, temporal views outermost. Errors: `UserError`, as `require_protocol`."""

    def __init__(
        self, shards: ShardSet, recipe: Recipe, *, views: tuple[int, int] = (1, 1)
    ) -> None:
        super().__init__(shards, recipe)
        self.views = views
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
        try:
            stride = self.stride(shard, sample)
            numbers = [
                view_frames(sample.num_frames, data.frames, stride, data.sampling, view, temporal)
                for view in range(temporal)
            ]
            frames = self.frames(shard, sample, np.concatenate(numbers))
        except DecodeError as error:
            return self._black(sample, keys, error)
        height, width = frames.shape[1:3]
        crops = [
            view_crop(height, width, data.size, view, spatial, short_side=data.test_short_side)
            for view in range(spatial)
        ]
        clips = [
            cut(clip, crop, data.size, flip=False)
            for clip in np.split(frames, temporal)
            for crop in crops
        ]
        return VideoClips(clips, keys, self._label(sample))


@contextmanager
def _decode_errors() -> Iterator[None]:
    """A video that is altered or unreachable counts as one that does not decode."""
    try:
        yield
    except UnreachableError as error:
        raise DecodeError("unreachable", str(error)) from None
    except AlteredError as error:
        raise DecodeError("altered", str(error)) from None


def require_protocol(shards: ShardSet, recipe: Recipe) -> None:
    """Errors: `UserError` where the settings contradict the labels of the data set. The rules of a
    data set also hold for shards that it was merged into. Flips are refused for every task; uniform
    sampling is required where labels are learnt."""
    data = recipe.data
    names = never_flipped(shards.manifest)
    if data.flip and names:
        raise UserError(
            f"data.flip=true, but {shards.name} {_contains(shards, names)}, whose labels tell left "
            "from right. Set data.flip: false."
        )
    names = sampled_uniformly(shards.manifest)
    if recipe.learns_labels and data.sampling != "uniform" and names:
        raise UserError(
            f"data.sampling={data.sampling}, but {shards.name} {_contains(shards, names)}, whose "
            "labels need the whole video. Set data.sampling: uniform."
        )


def for_labels(shards: ShardSet, recipe: Recipe) -> Recipe:
    """The recipe for probes on these shards: sampled as their labels need. Pretraining may sample a
    data set differently from what its labels need, and flip other data; a probe may not."""
    if recipe.learns_labels:
        return recipe
    needed: dict[str, Any] = {"sampling": "uniform"} if sampled_uniformly(shards.manifest) else {}
    needed |= {"flip": False} if never_flipped(shards.manifest) else {}
    data = recipe.data.model_copy(update=needed)
    return recipe.model_copy(update={"data": data})


def _contains(shards: ShardSet, names: Iterable[str]) -> str:
    name = " and ".join(sorted(names))
    return f"is {name}" if shards.manifest.dataset == name else f"has samples of {name}"
