"""Synthetic videos, each a function of (split, number), as H.264 files and shards.

`ensure_shards` makes only missing sets.
"""

from __future__ import annotations

import math
import multiprocessing
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from tqdm import tqdm

from arvideo_ds.decoding.video import TranscodeSettings, encode
from arvideo_ds.files.atomic import write_bytes
from arvideo_ds.files.locks import lock
from arvideo_ds.host import available_cores
from arvideo_ds.shards.datasets import Source, read_listing
from arvideo_ds.shards.manifest import MANIFEST
from arvideo_ds.shards.writer import ShardJob, write_shards

_ENCODING = TranscodeSettings(short_side=0, gop=8, crf=12)
_SAMPLES_PER_SHARD = 100


@dataclass(frozen=True)
class SyntheticSet:
    """A set of videos; video `number` has class `number % len(classes)`.

    draw: (class, generator) -> frames F H W 3, uint8; at the top of a module, for other processes.
    """

    name: str
    splits: Mapping[str, int]
    classes: tuple[str, ...]
    rate: Fraction
    draw: Callable[[int, np.random.Generator], np.ndarray]

    def generator(self, split: str, number: int) -> np.random.Generator:
        """The random numbers of a video."""
        return np.random.default_rng((list(self.splits).index(split), number))


def ensure_shards(videos: SyntheticSet, folder: Path) -> None:
    """Make videos and shards of missing splits in one process; other processes wait."""
    if all((folder / split / MANIFEST).exists() for split in videos.splits):
        return
    with lock(folder, wait=True):
        for split, count in videos.splits.items():
            if not (folder / split / MANIFEST).exists():
                make_shards(videos, folder, split, count)


def make_shards(videos: SyntheticSet, folder: Path, split: str, count: int) -> None:
    """`count` videos in folder/videos/<split>/<class>/, their shards in folder/<split>/."""
    files = folder / "videos"
    jobs = [(videos, files, split, number) for number in range(count)]
    print(f"{videos.name}: {count} {split} videos of {len(videos.classes)} classes", flush=True)
    # On Ctrl-C the main process ends the pool, without tracebacks of its processes.
    ignore = (signal.SIGINT, signal.SIG_IGN)
    workers = len(available_cores())
    with multiprocessing.get_context("spawn").Pool(workers, signal.signal, ignore) as pool:
        done = pool.imap_unordered(_write_video, jobs, chunksize=16)
        for _ in tqdm(done, total=count, unit="video", desc=f"{videos.name} {split}"):
            pass
    write_shards(
        ShardJob(
            dataset="folder",
            split=split,
            listing=read_listing("folder", Source(files, split=split)),
            output=folder / split,
            transcode=None,
            samples_per_shard=_SAMPLES_PER_SHARD,
            seed=0,
            workers=workers,
            timeout_s=60,
        )
    )


def _write_video(job: tuple[SyntheticSet, Path, str, int]) -> None:
    videos, files, split, number = job
    kind = number % len(videos.classes)
    path = files / split / videos.classes[kind] / f"{number:05d}.mp4"
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = videos.draw(kind, videos.generator(split, number))
    rgb = (av.VideoFrame.from_ndarray(frame, format="rgb24") for frame in frames)
    yuv = (frame.reformat(format="yuv420p") for frame in rgb)
    write_bytes(path, encode(yuv, rate=videos.rate, settings=_ENCODING))


def background(generator: np.random.Generator, side: int) -> np.ndarray:
    """Random colours in the four corners, blended: side x side x 3, 0..255."""
    corners = generator.uniform(0, 255, (2, 2, 3))
    share = np.linspace(0, 1, side)[:, None, None]
    rows = corners[0] * (1 - share) + corners[1] * share
    share = share[:, 0]
    return rows[:, :1] * (1 - share) + rows[:, 1:] * share


@dataclass(frozen=True)
class Drift:
    """Ranges of the motion of shapes: speed in pixels per frame, radius in pixels, and the largest
    distance of the path from the middle along each axis."""

    speeds: tuple[float, float]
    radii: tuple[float, float]
    aside: float

    def draw(self, frames: np.ndarray, angle: float, generator: np.random.Generator) -> np.ndarray:
        """Draw a random shape into frames F S S 3; it is near the middle halfway through.

        angle: radians; y grows downwards, so pi / 2 is north. Returns the share of each pixel that
        it covers: F S S 1, 0..1.
        """
        side = frames.shape[1]
        velocity = generator.uniform(*self.speeds) * np.array([math.cos(angle), -math.sin(angle)])
        surface = Surface(generator, side)
        middle = side / 2 + generator.uniform(-self.aside, self.aside, 2)
        radius, form = generator.uniform(*self.radii), int(generator.integers(4))
        y, x = np.mgrid[:side, :side] + 0.5
        covers = np.empty((*frames.shape[:3], 1))
        for number, frame in enumerate(frames):
            centre = middle + velocity * (number - (len(frames) - 1) / 2)
            dx, dy = x - centre[0], y - centre[1]
            covers[number] = share = cover(form, dx, dy, radius)[..., None]
            frame[:] = frame * (1 - share) + surface(dx, dy) * share
        return covers


class Surface:
    """A colour with two long waves that move with the shape."""

    def __init__(self, generator: np.random.Generator, side: int) -> None:
        self._colour = generator.uniform(50, 205, 3)
        self._waves = []
        for _ in range(2):
            turn, phase = generator.uniform(0, math.tau, 2)
            frequency = generator.uniform(0.2, 0.5) * math.tau / side
            wave = (frequency * math.cos(turn), frequency * math.sin(turn), phase)
            self._waves.append((wave, generator.uniform(-120, 120, 3)))

    def __call__(self, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
        """Colours at pixel offsets from the shape's middle: ... x 3, 0..255."""
        colour = self._colour
        for (fx, fy, phase), height in self._waves:
            colour = colour + np.sin(fx * dx + fy * dy + phase)[..., None] * height
        return np.clip(colour, 0, 255)


def cover(form: int, dx: np.ndarray, dy: np.ndarray, radius: float) -> np.ndarray:
    """The share of each pixel that a disc, square, diamond or ring covers, 0..1."""
    right, down = np.abs(dx), np.abs(dy)
    distance = [
        np.hypot(right, down) - radius,
        np.maximum(right, down) - 0.9 * radius,
        (right + down) / math.sqrt(2) - 0.9 * radius,
        np.abs(np.hypot(right, down) - 0.75 * radius) - 0.4 * radius,
    ][form]
    return np.clip(0.5 - distance, 0, 1)
