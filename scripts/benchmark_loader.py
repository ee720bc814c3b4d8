#!/usr/bin/env python3
"""How fast clips come out of the shards: clips/s per core, ms per stage, peak memory. Prints JSON.

    python scripts/benchmark_loader.py SHARDS
    python scripts/benchmark_loader.py SHARDS --compare VIDEOS --repeats 4
    python scripts/benchmark_loader.py SHARDS --memory 20000 --workers 2 --cores 2

The whole path is timed: stored bytes -> batches handed to the trainer, all of it on `--cores`
cores, this process's share included. `--compare` also loads the folder VIDEOS, the same clips as
downloaded, the way the official VideoMAE code does: decord on the raw file, one clip per decode,
PIL crops, float tensors normalised on the CPU; same run, workers, batch size and cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from arvideo_ds.arguments import CommandParser
from arvideo_ds.config import PretrainRecipe, load_recipe
from arvideo_ds.data.clips import TrainClips
from arvideo_ds.data.loader import collate
from arvideo_ds.data.sampling import train_frames
from arvideo_ds.data.transforms import cut, multi_scale_crop
from arvideo_ds.decoding.decoders import decode
from arvideo_ds.errors import UserError, command
from arvideo_ds.host import (
    available_cores,
    bind_to_cores,
    cpu_name,
    peak_resident_bytes,
    proportional_bytes,
)
from arvideo_ds.shards.manifest import ShardSet
from arvideo_ds.shards.video_files import find_videos

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_WARM_UP_BATCHES = 2
_STAGE_CLIPS = 60


@command
def main() -> None:
    args = parse_arguments()
    cores = available_cores()[: args.cores]
    if len(cores) < args.cores:
        raise UserError(f"--cores {args.cores}, but this process may use {len(cores)}.")
    bind_to_cores(cores)
    torch.set_num_threads(1)
    recipe = load_recipe(
        "pretrain_vit_b_k400",
        [
            f"data.shards={args.shards}",
            f"data.repeats={args.repeats}",
            f"data.frames={args.frames}",
            f"data.stride={args.stride}",
            f"data.decoder={args.decoder}",
        ],
    )
    shards = ShardSet(args.shards)
    clips = TrainClips(shards, recipe, num_workers=args.workers)
    result: dict[str, Any] = {
        "clip": [args.frames, *recipe.data.size],
        "stride": args.stride,
        "repeats": args.repeats,
        "batch": args.batch,
        "cores": args.cores,
        "workers": args.workers,
        "shards": shards.manifest.settings | {"samples": shards.num_samples},
        "decoder": clips.decoder,
        "ours": measure(endless(clips, args), args),
        "stages_ms_per_clip": stages(clips, recipe),
    }
    per_core = result["ours"]["clips_per_s_per_core"]
    result["cores_per_gpu"] = {
        str(need): round(need / per_core, 1) for need in (250, 500, 1000, 2000)
    }
    if args.compare:
        peer = PeerClips(args.compare, recipe)
        result["peer"] = measure(endless_peer(peer, args), args)
        result["times_the_peer"] = round(per_core / result["peer"]["clips_per_s_per_core"], 2)
    if args.memory:
        result["memory"] = memory_growth(endless(clips, args), args.memory)
    result["machine"] = machine()
    print(json.dumps(result, indent=1))


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--compare", type=Path, metavar="VIDEOS", help="the same clips, raw files")
    parser.add_argument("--memory", type=int, metavar="CLIPS", help="growth over so many clips")
    parser.add_argument("--repeats", type=int, default=1, help="clips per decoded video")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--stride", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16, help="clips per batch")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--cores", type=int, default=1, help="cores that all processes share")
    parser.add_argument("--seconds", type=float, default=20, help="of each measurement")
    parser.add_argument("--decoder", default="auto")
    return parser.parse_args()


def endless(clips: TrainClips, args: argparse.Namespace) -> DataLoader[Any]:
    """Batches of the real training data set, positions 0, 1, 2, ... for good."""
    videos = max(1, args.batch // args.repeats)
    return DataLoader(
        clips, batch_sampler=Positions(videos), num_workers=args.workers, collate_fn=collate
    )


def endless_peer(clips: PeerClips, args: argparse.Namespace) -> DataLoader[Any]:
    return DataLoader(clips, batch_sampler=Positions(args.batch), num_workers=args.workers)


class Positions:
    """Lists of consecutive numbers without end."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __iter__(self) -> Iterator[list[int]]:
        start = 0
        while True:
            yield list(range(start, start + self._size))
            start += self._size


class PeerClips(Dataset[Tensor]):
    """One float clip C F h w per raw file, as VideoMAE's pretraining data set loads it."""

    def __init__(self, videos: Path, recipe: PretrainRecipe) -> None:
        self.paths = list(find_videos(videos))
        if not self.paths:
            raise UserError(f"--compare {videos} has no videos.")
        self.data = recipe.data

    def __getitem__(self, number: int) -> Tensor:
        from decord import VideoReader

        generator = np.random.default_rng(number)
        reader = VideoReader(str(self.paths[number % len(self.paths)]), num_threads=1)
        wanted = train_frames(
            len(reader), self.data.frames, self.data.stride, self.data.sampling, generator
        )
        frames = [Image.fromarray(frame) for frame in reader.get_batch(wanted.tolist()).asnumpy()]
        width, height = frames[0].size
        crop = multi_scale_crop(height, width, self.data.size, self.data.crop_scales, generator)
        box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
        size = self.data.size[::-1]
        cropped = [f.crop(box).resize(size, Image.Resampling.BILINEAR) for f in frames]
        clip = torch.from_numpy(np.concatenate([np.asarray(f) for f in cropped], axis=2))
        clip = clip.permute(2, 0, 1).contiguous().float().div(255)
        mean = torch.tensor(_MEAN * len(frames))[:, None, None]
        std = torch.tensor(_STD * len(frames))[:, None, None]
        clip.sub_(mean).div_(std)
        return clip.view(len(frames), 3, *self.data.size).transpose(0, 1)


def measure(loader: DataLoader[Any], args: argparse.Namespace) -> dict[str, Any]:
    """Batches for `args.seconds` after a warm-up."""
    batches = iter(loader)
    for _ in range(_WARM_UP_BATCHES):
        next(batches)
    clips = num_bytes = 0
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < args.seconds:
        batch = next(batches)
        tensor = batch if isinstance(batch, Tensor) else batch.clips
        clips += len(tensor)
        num_bytes += tensor.nbytes
    workers = getattr(batches, "_workers", [])
    memory = sum(shared_mib(worker.pid) for worker in workers)
    del batches
    return {
        "clips_per_s_per_core": round(clips / elapsed / args.cores, 2),
        "clips": clips,
        "seconds": round(elapsed, 1),
        "mib_per_s_to_trainer": round(num_bytes / elapsed / 2**20, 1),
        "workers_resident_mib": round(memory),
    }


def memory_growth(loader: DataLoader[Any], clips: int) -> dict[str, Any]:
    """Resident memory of workers and trainer after a tenth of the clips and after all of them."""
    batches: Any = iter(loader)
    processes = [os.getpid(), *(worker.pid for worker in batches._workers)]
    seen, after_tenth = 0, 0.0
    while seen < clips:
        seen += len(next(batches).keys)
        if not after_tenth and seen >= clips // 10:
            after_tenth = sum(shared_mib(pid) for pid in processes)
    at_end = sum(shared_mib(pid) for pid in processes)
    return {
        "clips": seen,
        "resident_mib_after_a_tenth": round(after_tenth, 1),
        "resident_mib_at_the_end": round(at_end, 1),
        "growth_pct": round(100 * (at_end / after_tenth - 1), 2),
    }


def shared_mib(pid: int) -> float:
    """Memory of a process, shared pages by its share of them (PSS)."""
    return proportional_bytes(pid) / 2**20


def stages(clips: TrainClips, recipe: PretrainRecipe) -> dict[str, float]:
    """Mean ms of each stage per clip, one thread, no worker: where the time goes."""
    data, shards = recipe.data, clips.shards
    spent: dict[str, float] = {}

    def timed(name: str, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        start = time.perf_counter()
        value = function(*arguments, **named)
        spent[name] = spent.get(name, 0.0) + time.perf_counter() - start
        return value

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    made, videos = 0, []
    for position in range(-(-_STAGE_CLIPS // data.repeats)):
        generator = np.random.default_rng(position)
        place = timed("order", clips.order.place, position)
        sample = shards.index(place.shard).samples[place.member]
        content = timed("read", shards.read, place.shard, sample)
        wanted = train_frames(sample.num_frames, data.frames, data.stride, data.sampling, generator)
        frames = timed("decode", decode, clips.decoder, content, wanted)
        height, width = frames.shape[1:3]
        for _ in range(data.repeats):
            crop = multi_scale_crop(height, width, data.size, data.crop_scales, generator)
            timed("crop", cut, frames, crop, data.size, flip=False)
            made += 1
        videos.append(clips[position])
        if len(videos) * data.repeats >= 16:
            batch = timed("collate", collate, videos)
            timed("transfer", batch.to, device)
            videos = []
    return {name: round(1000 * seconds / made, 3) for name, seconds in spent.items()}


def machine() -> dict[str, Any]:
    return {
        "cpu": cpu_name(),
        "cores_of_machine": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "peak_rss_of_main_process_mib": peak_resident_bytes() // 2**20,
    }


if __name__ == "__main__":
    sys.exit(main())
