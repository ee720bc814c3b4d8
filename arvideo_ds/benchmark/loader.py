"""Speed of the loader: clips/s per core, ms of each stage, peak memory.

The whole path is timed, from stored bytes to the trainer's batches. The peer loads the same clips
from raw files as the official VideoMAE code does.
"""

from __future__ import annotations

import itertools
import os
import platform
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from arvideo_ds.config import PretrainRecipe, load_recipe
from arvideo_ds.data.clips import TrainClips
from arvideo_ds.data.loader import TrainLoader, collate
from arvideo_ds.data.sampling import train_frames
from arvideo_ds.data.transforms import multi_scale_crop
from arvideo_ds.decoding.decoders import decode, decode_planes
from arvideo_ds.errors import UserError
from arvideo_ds.host import cpu_name, cpu_seconds, peak_resident_bytes, proportional_bytes
from arvideo_ds.planning.plan import make_plan
from arvideo_ds.shards.manifest import ShardSet
from arvideo_ds.shards.video_files import count_videos, find_videos

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_WARM_UP_BATCHES = 8
_ENDLESS = 10**9
_STAGE_CLIPS = 60
_SETTINGS = ("shards", "repeats", "frames", "stride", "decoder", "planes")
_REPORTED = ("stride", "repeats", "planes", "batch", "cores", "workers")
# Clips/s that a GPU may consume.
_RATES = (250, 500, 1000, 2000)


@dataclass(frozen=True)
class LoaderOptions:
    """compare: folder of the same clips as raw files. memory: clips over which to measure growth.

    repeats: clips per decoded video. batch: clips per batch. cores: shared by all processes.
    seconds: of each measurement.
    """

    shards: str
    compare: Path | None
    memory: int | None
    repeats: int
    frames: int
    stride: int
    batch: int
    workers: int
    cores: int
    seconds: float
    decoder: str
    planes: bool


def measure_loader(options: LoaderOptions) -> dict[str, Any]:
    """All measurements as one JSON document. Errors: `UserError`."""
    torch.set_num_threads(1)
    batch = max(1, options.batch // options.repeats) * options.repeats
    settings = [f"data.{key}={getattr(options, key)}" for key in _SETTINGS]
    settings += [f"train.{key}={batch}" for key in ("total_batch", "micro_batch")]
    recipe = load_recipe("pretrain_vit_b_k400", [*settings, f"train.max_steps={_ENDLESS}"])
    shards = ShardSet(options.shards)
    clips = TrainClips(shards, recipe)
    result: dict[str, Any] = {
        "clip": [options.frames, *recipe.data.size],
        **{key: getattr(options, key) for key in _REPORTED},
        "shards": shards.manifest.settings | {"samples": shards.num_samples},
        "decoder": clips.decoder,
        "ours": _measure(_loader(shards, recipe, options), options),
        "stages_ms_per_clip": _stages(clips, recipe),
    }
    per_core = result["ours"]["clips_per_s_per_core"]
    result["cores_per_gpu"] = {str(rate): round(rate / per_core, 1) for rate in _RATES}
    if options.compare:
        peer = PeerClips(options.compare, recipe)
        result["peer"] = _measure(_peer_loader(peer, options), options)
        result["times_the_peer"] = round(per_core / result["peer"]["clips_per_s_per_core"], 2)
    if options.memory:
        result["memory"] = _memory_growth(_loader(shards, recipe, options), options.memory)
    result["machine"] = {
        "cpu": cpu_name(),
        "cores_of_machine": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "peak_rss_of_main_process_mib": peak_resident_bytes() // 2**20,
    }
    return result


def _loader(shards: ShardSet, recipe: PretrainRecipe, options: LoaderOptions) -> TrainLoader:
    plan = make_plan(recipe, world_size=1, num_videos=shards.num_samples)
    return TrainLoader(
        shards,
        recipe,
        plan,
        rank=0,
        first_step=0,
        num_workers=options.workers,
        pin_memory=torch.cuda.is_available(),
    )


def _peer_loader(clips: Dataset[Any], options: LoaderOptions) -> DataLoader[Any]:
    """Endless batches, positions 0, 1, 2, ..."""
    size = options.batch
    batches = (list(range(n, n + size)) for n in itertools.count(step=size))
    return DataLoader(clips, batch_sampler=batches, num_workers=options.workers)


class PeerClips(Dataset[Tensor]):
    """One float clip C F h w per raw file, as VideoMAE's pretraining data set loads it."""

    def __init__(self, videos: Path, recipe: PretrainRecipe) -> None:
        skipped = Counter[str]()
        self.paths = list(find_videos(videos, skipped))
        print(count_videos(str(videos), len(self.paths), skipped), file=sys.stderr, flush=True)
        if not self.paths:
            raise UserError(f"--compare {videos} has no videos.")
        self.data = recipe.data

    def __getitem__(self, number: int) -> Tensor:
        from decord import VideoReader

        data, generator = self.data, np.random.default_rng(number)
        reader = VideoReader(str(self.paths[number % len(self.paths)]), num_threads=1)
        stride = data.stride_at(reader.get_avg_fps())
        numbers = train_frames(len(reader), data.frames, stride, data.sampling, generator)
        frames = [Image.fromarray(frame) for frame in reader.get_batch(numbers.tolist()).asnumpy()]
        width, height = frames[0].size
        crop = multi_scale_crop(height, width, data.size, data.crop_scales, generator)
        box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
        size = data.size[::-1]
        cropped = [f.crop(box).resize(size, Image.Resampling.BILINEAR) for f in frames]
        clip = torch.from_numpy(np.concatenate([np.asarray(f) for f in cropped], axis=2))
        clip = clip.permute(2, 0, 1).contiguous().float().div(255)
        mean = torch.tensor(_MEAN * len(frames))[:, None, None]
        std = torch.tensor(_STD * len(frames))[:, None, None]
        clip.sub_(mean).div_(std)
        return clip.view(len(frames), 3, *data.size).transpose(0, 1)


def _measure(loader: TrainLoader | DataLoader[Any], options: LoaderOptions) -> dict[str, Any]:
    """Batches for `options.seconds` after a warm-up."""
    batches: Any = iter(loader)
    for _ in range(_WARM_UP_BATCHES):
        next(batches)
    workers = _pids(loader, batches)
    clips = num_bytes = 0
    cpu_s, start = -_cpu_seconds(workers), time.perf_counter()
    while (elapsed := time.perf_counter() - start) < options.seconds:
        batch = next(batches)
        tensor = batch if isinstance(batch, Tensor) else batch.clips
        clips += len(tensor)
        num_bytes += tensor.nbytes
    cpu_s += _cpu_seconds(workers)
    memory = _shared_mib(workers)
    del batches
    return {
        "clips_per_s_per_core": round(clips / elapsed / options.cores, 2),
        "clips": clips,
        "seconds": round(elapsed, 1),
        "cpu_ms_per_clip": round(1000 * cpu_s / clips, 2),
        "mib_per_s_to_trainer": round(num_bytes / elapsed / 2**20, 1),
        "workers_resident_mib": round(memory),
    }


def _pids(loader: TrainLoader | DataLoader[Any], batches: Any) -> list[int]:
    if isinstance(loader, TrainLoader):
        return loader.worker_pids
    return [worker.pid for worker in getattr(batches, "_workers", [])]


def _memory_growth(loader: TrainLoader, clips: int) -> dict[str, Any]:
    """Resident memory of workers and trainer after a tenth of the clips and after all of them."""
    batches = iter(loader)
    loaded, after_tenth = len(next(batches).keys), 0.0
    processes = [os.getpid(), *loader.worker_pids]
    while loaded < clips:
        loaded += len(next(batches).keys)
        if not after_tenth and loaded >= clips // 10:
            after_tenth = _shared_mib(processes)
    at_end = _shared_mib(processes)
    return {
        "clips": loaded,
        "resident_mib_after_a_tenth": round(after_tenth, 1),
        "resident_mib_at_the_end": round(at_end, 1),
        "growth_pct": round(100 * (at_end / after_tenth - 1), 2),
    }


def _cpu_seconds(workers: Iterable[int]) -> float:
    return sum(map(cpu_seconds, (os.getpid(), *workers)))


def _shared_mib(pids: Iterable[int]) -> float:
    """Proportional set size (PSS) of processes."""
    return sum(map(proportional_bytes, pids)) / 2**20


def _stages(clips: TrainClips, recipe: PretrainRecipe) -> dict[str, float]:
    """Mean ms of each stage per clip, in one thread without workers."""
    data, shards = recipe.data, clips.shards
    seconds: dict[str, float] = defaultdict(float)

    def timed(stage: str, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        start = time.perf_counter()
        value = function(*arguments, **named)
        seconds[stage] += time.perf_counter() - start
        return value

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    made, videos = 0, []
    for position in range(-(-_STAGE_CLIPS // data.repeats)):
        generator = np.random.default_rng(position)
        place = timed("order", clips.order.place, position)
        sample = shards.index(place.shard).samples[place.member]
        content = timed("read", shards.read, place.shard, sample)
        times = data.frames, clips.stride(place.shard, sample), data.sampling
        numbers = train_frames(sample.num_frames, *times, generator, shards.layers)
        if data.planes:
            frames = timed("decode", decode_planes, content, numbers)
        else:
            frames = timed("decode", decode, clips.decoder, content, numbers)
        height, width = clips.frame_size(frames)
        for _ in range(data.repeats):
            crop = multi_scale_crop(height, width, data.size, data.crop_scales, generator)
            timed("crop", clips.cut, frames, crop, data.size, flip=False)
            made += 1
        videos.append(clips[position])
        if len(videos) * data.repeats >= 16:
            batch = timed("collate", collate, videos)
            timed("transfer", batch.to, device)
            videos = []
    return {stage: round(1000 * total / made, 3) for stage, total in seconds.items()}
