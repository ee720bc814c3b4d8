"""The demo: videos in which the class is the motion and nothing else.

A textured background stands still; a shape of random form, colour and size crosses it in one of
eight directions. One frame says nothing about the class, so an encoder that separates the classes
has learned motion. Real H.264 files, made into shards as any other folder of videos.
"""

from __future__ import annotations

import fcntl
import math
import multiprocessing
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from tqdm import tqdm

from arvideo_ds.data.annotations import Source, read_entries
from arvideo_ds.data.manifest import MANIFEST
from arvideo_ds.data.shard_writer import ShardJob, write_shards
from arvideo_ds.data.video import TranscodeSettings, encode

DEMO_FOLDER = Path("data/demo")
SPLITS = {"train": 2400, "test": 800}
DIRECTIONS = (
    "east", "north_east", "north", "north_west", "west", "south_west", "south", "south_east",
)  # fmt: skip
SIDE, FRAMES, RATE = 40, 12, Fraction(12)
_ENCODING = TranscodeSettings(short_side=0, gop=8, crf=12)
_SAMPLES_PER_SHARD = 100


def ensure_demo_shards(folder: Path = DEMO_FOLDER) -> None:
    """Make videos and shards of both splits where they are missing; one process does, all wait."""
    if all((folder / split / MANIFEST).exists() for split in SPLITS):
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        for split, count in SPLITS.items():
            if not (folder / split / MANIFEST).exists():
                make_split(folder, split, count)


def make_split(folder: Path, split: str, count: int) -> None:
    """`count` videos in folder/videos/<split>/<direction>/, their shards in folder/<split>/."""
    videos = folder / "videos"
    jobs = [(videos, split, number) for number in range(count)]
    print(f"demo: {count} {split} videos in {len(DIRECTIONS)} directions of motion", flush=True)
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        done = pool.imap_unordered(_write_video, jobs, chunksize=16)
        for _ in tqdm(done, total=count, unit="video", desc=f"demo {split}"):
            pass
    write_shards(
        ShardJob(
            dataset="folder",
            split=split,
            entries=read_entries("folder", Source(videos, split=split)),
            output=folder / split,
            transcode=None,
            samples_per_shard=_SAMPLES_PER_SHARD,
            seed=0,
            workers=os.cpu_count() or 1,
            timeout_s=60,
        )
    )


def _write_video(job: tuple[Path, str, int]) -> None:
    videos, split, number = job
    direction = DIRECTIONS[number % len(DIRECTIONS)]
    path = videos / split / direction / f"{number:05d}.mp4"
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng((list(SPLITS).index(split), number))
    frames = render(number % len(DIRECTIONS), generator)
    temporary = path.with_suffix(".partial")
    temporary.write_bytes(encode(_video_frames(frames), rate=RATE, settings=_ENCODING))
    temporary.replace(path)


def render(direction: int, generator: np.random.Generator) -> np.ndarray:
    """One video, uint8, FRAMES x SIDE x SIDE x 3; y grows downwards, so north is up."""
    background = _texture(generator, coarse=5)
    surface = np.clip(_texture(generator, coarse=3) * 0.5 + generator.uniform(40, 215, 3), 0, 255)
    angle = math.tau * direction / len(DIRECTIONS)
    velocity = generator.uniform(1.5, 2.4) * np.array([math.cos(angle), -math.sin(angle)])
    middle = SIDE / 2 + generator.uniform(-5, 5, 2)
    radius = generator.uniform(4.5, 7.5)
    form = int(generator.integers(4))
    frames = []
    for frame in range(FRAMES):
        centre = middle + velocity * (frame - (FRAMES - 1) / 2)
        cover = _cover(form, centre, radius)[..., None]
        frames.append(background * (1 - cover) + surface * cover)
    return np.stack(frames).round().astype(np.uint8)


def _texture(generator: np.random.Generator, coarse: int) -> np.ndarray:
    """Smooth coloured noise: a coarse random grid, linearly enlarged; SIDE x SIDE x 3, 0..255."""
    grid = generator.uniform(0, 255, (coarse + 1, coarse + 1, 3))
    at = np.linspace(0, coarse, SIDE, endpoint=False)
    low, share = at.astype(int), (at % 1)[:, None]
    rows = grid[low] * (1 - share[..., None]) + grid[low + 1] * share[..., None]
    return rows[:, low] * (1 - share) + rows[:, low + 1] * share


def _cover(form: int, centre: np.ndarray, radius: float) -> np.ndarray:
    """How much of each pixel a disc, square, diamond or ring covers, 0..1, smooth at the edge."""
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    dx, dy = np.abs(x - centre[0]), np.abs(y - centre[1])
    distance = [
        np.hypot(dx, dy) - radius,
        np.maximum(dx, dy) - 0.9 * radius,
        (dx + dy) / math.sqrt(2) - 0.9 * radius,
        np.abs(np.hypot(dx, dy) - 0.8 * radius) - 0.35 * radius,
    ][form]
    return np.clip(0.5 - distance, 0, 1)


def _video_frames(frames: np.ndarray) -> Iterator[av.VideoFrame]:
    for frame in frames:
        yield av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="yuv420p")
