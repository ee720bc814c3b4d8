"""The demo: videos in which the class is the motion and nothing else.

Before a still background of blended colours, a shape of random form, colour and size drifts past
the middle in one of eight directions. Form, colours and speed say nothing about the class. Real
H.264 files, made into shards as any other folder of videos.
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

from arvideo_ds.data.datasets import Source, read_listing
from arvideo_ds.data.manifest import MANIFEST
from arvideo_ds.data.shard_writer import ShardJob, write_shards
from arvideo_ds.data.video import TranscodeSettings, encode

DEMO_FOLDER = Path("data/demo")
SPLITS = {"train": 2400, "test": 800}
DIRECTIONS = (
    "east", "north_east", "north", "north_west", "west", "south_west", "south", "south_east",
)  # fmt: skip
SIDE, FRAMES, RATE = 40, 12, Fraction(12)
# Pixels per frame; pixels; how far from the middle the way passes, in pixels.
_SPEEDS, _RADII, _ASIDE = (1.5, 2.4), (5.0, 8.0), 5.0
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
            listing=read_listing("folder", Source(videos, split=split)),
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
    frames, _ = scene(split, number)
    temporary = path.with_suffix(".partial")
    temporary.write_bytes(encode(_video_frames(frames), rate=RATE, settings=_ENCODING))
    temporary.replace(path)


def scene(split: str, number: int) -> tuple[np.ndarray, np.ndarray]:
    """The frames of a video before they are encoded, and where its shape is: as `render_scene`."""
    generator = np.random.default_rng((list(SPLITS).index(split), number))
    return render_scene(number % len(DIRECTIONS), generator)


def render(direction: int, generator: np.random.Generator) -> np.ndarray:
    """One video, uint8, FRAMES x SIDE x SIDE x 3; y grows downwards, so north is up."""
    return render_scene(direction, generator)[0]


def render_scene(direction: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The frames as `render`, and how much of each pixel the shape covers: F x S x S x 1, 0..1."""
    frames = np.repeat(_background(generator)[None], FRAMES, axis=0)
    angle = math.tau * direction / len(DIRECTIONS)
    velocity = generator.uniform(*_SPEEDS) * np.array([math.cos(angle), -math.sin(angle)])
    surface = _Surface(generator)
    middle = SIDE / 2 + generator.uniform(-_ASIDE, _ASIDE, 2)
    radius, form = generator.uniform(*_RADII), int(generator.integers(4))
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    covers = np.empty((*frames.shape[:3], 1))
    for number, frame in enumerate(frames):
        centre = middle + velocity * (number - (FRAMES - 1) / 2)
        dx, dy = x - centre[0], y - centre[1]
        covers[number] = cover = _cover(form, dx, dy, radius)[..., None]
        frame[:] = frame * (1 - cover) + surface(dx, dy) * cover
    return frames.round().astype(np.uint8), covers


def _background(generator: np.random.Generator) -> np.ndarray:
    """Four random colours in the corners, blended: SIDE x SIDE x 3, 0..255."""
    corners = generator.uniform(0, 255, (2, 2, 3))
    share = np.linspace(0, 1, SIDE)[:, None, None]
    rows = corners[0] * (1 - share) + corners[1] * share
    share = share[:, 0]
    return rows[:, :1] * (1 - share) + rows[:, 1:] * share


class _Surface:
    """A colour with two long waves over it that travel with the shape."""

    def __init__(self, generator: np.random.Generator) -> None:
        self._colour = generator.uniform(50, 205, 3)
        self._waves = []
        for _ in range(2):
            turn, phase = generator.uniform(0, math.tau, 2)
            frequency = generator.uniform(0.2, 0.5) * math.tau / SIDE
            wave = (frequency * math.cos(turn), frequency * math.sin(turn), phase)
            self._waves.append((wave, generator.uniform(-120, 120, 3)))

    def __call__(self, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
        colour = self._colour
        for (fx, fy, phase), height in self._waves:
            colour = colour + np.sin(fx * dx + fy * dy + phase)[..., None] * height
        return np.clip(colour, 0, 255)


def _cover(form: int, dx: np.ndarray, dy: np.ndarray, radius: float) -> np.ndarray:
    """How much of each pixel a disc, square, diamond or ring covers, 0..1, smooth at the edge."""
    right, down = np.abs(dx), np.abs(dy)
    distance = [
        np.hypot(right, down) - radius,
        np.maximum(right, down) - 0.9 * radius,
        (right + down) / math.sqrt(2) - 0.9 * radius,
        np.abs(np.hypot(right, down) - 0.75 * radius) - 0.4 * radius,
    ][form]
    return np.clip(0.5 - distance, 0, 1)


def _video_frames(frames: np.ndarray) -> Iterator[av.VideoFrame]:
    for frame in frames:
        yield av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="yuv420p")
