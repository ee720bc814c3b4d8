"""Shards of videos in which every token differs from its neighbours in place and time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from arvideo_ds.decoding.video import TranscodeSettings, encode
from arvideo_ds.shards.datasets import Source, read_listing
from arvideo_ds.shards.manifest import MANIFEST, index_name
from arvideo_ds.shards.writer import ShardJob, write_shards

# Height, width, frames.
SHAPES = [
    (48, 64, 150), (96, 64, 97), (32, 32, 64), (36, 100, 41), (48, 64, 33),
    (96, 64, 80), (48, 64, 5), (40, 40, 23), (48, 64, 1),
]  # fmt: skip
_ENCODING = TranscodeSettings(short_side=0, gop=8, crf=12)


def make_textured(folder: Path) -> Path:
    """The folder of the shards: three of three videos."""
    if (folder / "shards" / MANIFEST).exists():
        return folder / "shards"
    videos = folder / "videos"
    videos.mkdir()
    for number, shape in enumerate(SHAPES):
        frames = _frames(np.random.default_rng(number), *shape)
        data = encode(frames, rate=Fraction(25), settings=_ENCODING)
        (videos / f"v{number}_{shape[2]}.mp4").write_bytes(data)
    write_shards(
        ShardJob(
            dataset="folder",
            split=None,
            listing=read_listing("folder", Source(videos)),
            output=folder / "shards",
            transcode=None,
            samples_per_shard=3,
            seed=0,
            workers=1,
            timeout_s=60,
        )
    )
    return folder / "shards"


def _frames(
    generator: np.random.Generator, height: int, width: int, frames: int
) -> Iterator[av.VideoFrame]:
    """Colours of 4 x 4 pixels that wander, each at its own pace."""
    start = generator.uniform(0, 6, (height // 4 + 1, width // 4 + 1, 3))
    pace = generator.uniform(0.02, 0.5, start.shape)
    for number in range(frames):
        colours = 127 + 120 * np.sin(start + pace * number)
        pixels = colours.repeat(4, axis=0).repeat(4, axis=1)[:height, :width]
        picture = av.VideoFrame.from_ndarray(pixels.astype(np.uint8), format="rgb24")
        yield picture.reformat(format="yuv420p")


def repeat_shards(shards: Path, folder: Path, times: int) -> None:
    """The same shards, several times under other names, as one set."""
    manifest = json.loads((shards / "manifest.json").read_text())
    folder.mkdir()
    entries = []
    for number in range(times):
        for entry in manifest["shards"]:
            name = f"r{number}-{entry['name']}"
            shutil.copy(shards / entry["name"], folder / name)
            shutil.copy(shards / index_name(entry["name"]), folder / index_name(name))
            entries.append({**entry, "name": name})
    manifest["shards"] = entries
    manifest["num_samples"] *= times
    (folder / "manifest.json").write_text(json.dumps(manifest))
