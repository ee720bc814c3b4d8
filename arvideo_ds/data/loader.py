"""Clips in batches: position -> bytes -> frames -> clips, in worker processes.

PyTorch's DataLoader keeps the order, whatever the number of workers; all that is ours is which
position comes when (order.py) and what a position is (here).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from arvideo_ds.config import Recipe, RunPlan
from arvideo_ds.data.decoders import DecodeError, choose_decoder, decode
from arvideo_ds.data.manifest import IndexedSample, ShardSet
from arvideo_ds.data.order import SampleOrder, rank_positions
from arvideo_ds.data.sampling import central_frames, train_frames
from arvideo_ds.data.transforms import center_crop, cut, multi_scale_crop
from arvideo_ds.errors import UserError
from arvideo_ds.randomness import clip_generator, draw_key

NO_LABEL = -1
# Data sets whose labels depend on left and right.
NEVER_FLIPPED = frozenset({"ssv2"})
_MAX_AUTO_WORKERS = 8


@dataclass(frozen=True)
class Skipped:
    """A video that did not decode while training."""

    key: str
    kind: str
    message: str


@dataclass(frozen=True)
class VideoClips:
    """Clips of one video: K F h w 3, uint8, with the model's key of each."""

    clips: Tensor
    keys: list[int]
    label: int
    skipped: Skipped | None = None


@dataclass
class Batch:
    """Clips B F h w 3 (uint8), keys B (int64), labels B (int64, -1 = none), valid B (bool).

    A clip whose video did not decode is black and not valid: shapes stay fixed, the loss leaves
    it out. `num_skipped` counts those clips, `skipped` names their videos.
    """

    clips: Tensor
    keys: Tensor
    labels: Tensor
    valid: Tensor
    num_skipped: int = 0
    skipped: list[Skipped] = field(default_factory=list)

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device; the copy overlaps when the memory is pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Any) -> Batch:
        return Batch(
            change(self.clips),
            change(self.keys),
            change(self.labels),
            change(self.valid),
            self.num_skipped,
            self.skipped,
        )


class TrainClips(Dataset[VideoClips]):
    """Run position -> augmented clips of one video; all draws are functions of the position."""

    def __init__(self, shards: ShardSet, recipe: Recipe) -> None:
        data = recipe.data
        if data.flip and shards.manifest.dataset in NEVER_FLIPPED:
            raise UserError(
                f"data.flip=true, but {shards.folder} is {shards.manifest.dataset}, whose labels "
                "tell left from right. Set data.flip: false."
            )
        self.shards, self.data, self.seed = shards, data, recipe.train.seed
        self.decoder = choose_decoder(data.decoder)
        self.order = SampleOrder(
            [shard.samples for shard in shards.manifest.shards],
            seed=self.seed,
            num_streams=data.num_streams,
            window_shards=data.window_shards,
        )

    def __getitem__(self, run_position: int) -> VideoClips:
        data = self.data
        place = self.order.place(run_position)
        sample = self.shards.index(place.shard).samples[place.member]
        keys = [
            draw_key(self.seed, place.epoch, place.position, repeat)
            for repeat in range(data.repeats)
        ]
        # The K clips share one decode: the same frames, different crops (VideoMAE V2).
        generator = clip_generator(self.seed, place.epoch, place.position, 0)
        wanted = train_frames(sample.num_frames, data.frames, data.stride, data.sampling, generator)
        try:
            frames = decode(self.decoder, self.shards.read(place.shard, sample), wanted)
        except DecodeError as error:
            black = torch.zeros(data.repeats, data.frames, *data.size, 3, dtype=torch.uint8)
            return VideoClips(black, keys, _label(sample), _skipped(sample, error))
        height, width = frames.shape[1:3]
        clips = []
        for repeat in range(data.repeats):
            generator = clip_generator(self.seed, place.epoch, place.position, 1 + repeat)
            crop = multi_scale_crop(height, width, data.size, data.crop_scales, generator)
            flip = data.flip and bool(generator.integers(2))
            clips.append(cut(frames, crop, data.size, flip=flip))
        return VideoClips(torch.stack(clips), keys, _label(sample))


class EvaluationClips(Dataset[VideoClips]):
    """Sample number -> its central clip; every sample once, in the order of the shards."""

    def __init__(self, shards: ShardSet, recipe: Recipe) -> None:
        self.shards, self.data = shards, recipe.data
        self.decoder = choose_decoder(recipe.data.decoder)
        self.places = [
            (number, member)
            for number, shard in enumerate(shards.manifest.shards)
            for member in range(shard.samples)
        ]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> VideoClips:
        data = self.data
        shard, member = self.places[number]
        sample = self.shards.index(shard).samples[member]
        wanted = central_frames(sample.num_frames, data.frames, data.stride, data.sampling)
        try:
            frames = decode(self.decoder, self.shards.read(shard, sample), wanted)
        except DecodeError as error:
            black = torch.zeros(1, data.frames, *data.size, 3, dtype=torch.uint8)
            return VideoClips(black, [number], _label(sample), _skipped(sample, error))
        height, width = frames.shape[1:3]
        crop = center_crop(height, width, data.size)
        return VideoClips(cut(frames, crop, data.size, flip=False)[None], [number], _label(sample))


class TrainLoader:
    """Micro-batches of one rank from a step to the end of the run.

    Errors: `UserError` on iteration when no batch came within data.timeout_s.
    """

    def __init__(
        self,
        shards: ShardSet,
        recipe: Recipe,
        plan: RunPlan,
        *,
        rank: int,
        first_step: int,
        num_workers: int,
        pin_memory: bool,
    ) -> None:
        self._timeout_s = recipe.data.timeout_s if num_workers else 0
        self._dataset = TrainClips(shards, recipe)
        self.decoder = self._dataset.decoder
        # torch takes any iterable of lists here, though its types ask for a Sampler.
        positions: Any = rank_positions(plan, rank=rank, first_step=first_step)
        self._loader = DataLoader(
            self._dataset,
            batch_sampler=positions,
            num_workers=num_workers,
            collate_fn=collate,
            pin_memory=pin_memory,
            timeout=self._timeout_s,
            prefetch_factor=recipe.data.prefetch if num_workers else None,
            worker_init_fn=_start_worker,
        )

    def __iter__(self) -> Generator[Batch, None, None]:
        batches: Any = iter(self._loader)
        # Workers are stopped by torch's own hand, then for certain: they ignore SIGTERM, and one
        # may hang in native code. They hold no state worth saving.
        workers = getattr(batches, "_workers", [])
        try:
            while True:
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                except RuntimeError as error:
                    raise self._explained(error) from error
                yield batch
        finally:
            if workers:
                batches._shutdown_workers()
            for worker in workers:
                worker.kill()

    def _explained(self, error: RuntimeError) -> Exception:
        if "timed out" not in str(error):
            return error
        return UserError(
            f"no batch came from the data workers within data.timeout_s={self._timeout_s}: a "
            f"decoder ({self.decoder}) hangs, or the disk does. Check the shards, try another "
            "data.decoder, or raise data.timeout_s."
        )


def evaluation_loader(
    shards: ShardSet, recipe: Recipe, *, batch_size: int, num_workers: int
) -> DataLoader[VideoClips]:
    """Batches over every sample of the shards once; `Batch.keys` are the sample numbers."""
    return DataLoader(
        EvaluationClips(shards, recipe),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=collate,
        worker_init_fn=_start_worker,
    )


def collate(videos: list[VideoClips]) -> Batch:
    """Clips of several videos as one batch; the clips of a video stay together."""
    counts = torch.tensor([len(video.keys) for video in videos])
    valid = torch.tensor([video.skipped is None for video in videos]).repeat_interleave(counts)
    return Batch(
        clips=torch.cat([video.clips for video in videos]),
        keys=torch.tensor([key for video in videos for key in video.keys]),
        labels=torch.tensor([video.label for video in videos]).repeat_interleave(counts),
        valid=valid,
        num_skipped=int((~valid).sum()),
        skipped=[video.skipped for video in videos if video.skipped is not None],
    )


def worker_count(recipe: Recipe, *, ranks_on_host: int) -> int:
    """data.workers, or this host's share of cores per rank, at most 8."""
    if recipe.data.workers != "auto":
        return recipe.data.workers
    cores = len(os.sched_getaffinity(0))
    return max(1, min(_MAX_AUTO_WORKERS, cores // ranks_on_host))


def _start_worker(_worker: int) -> None:
    # One thread each: the workers themselves are the parallelism.
    torch.set_num_threads(1)
    # Signals go to whole process groups. The trainer decides what they mean; a worker that died
    # of one would take the last batches before the final checkpoint with it.
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)


def _label(sample: IndexedSample) -> int:
    return NO_LABEL if sample.label is None else sample.label


def _skipped(sample: IndexedSample, error: DecodeError) -> Skipped:
    return Skipped(sample.key, error.kind, error.message)
