"""A small AVA made on the spot: films in which squares move, a box and actions at every second.

A red square is action 1, a blue one action 2; one that moves down rather than right has action 3 as
well. Files begin at second 900, as the cut films of AVA do.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from arvideo_ds.decoding.video import TranscodeSettings, encode
from arvideo_ds.shards.datasets import Source, read_listing
from arvideo_ds.shards.manifest import MANIFEST
from arvideo_ds.shards.writer import ShardJob, write_shards

HEIGHT, WIDTH, RATE, SIDE = 48, 80, 8, 14
FIRST_SECOND, SECONDS = 900, 12
RED, BLUE, DOWN = 1, 2, 3
ACTION_LIST = "".join(
    f'item {{\n  name: "{name}"\n  id: {number}\n}}\n'
    for number, name in ((RED, "red"), (BLUE, "blue"), (DOWN, "down"))
)


@dataclass(frozen=True)
class AvaSet:
    """Where everything lies: shards, annotations, person boxes (CSV), the label map."""

    shards: Path
    annotations: Path
    detections: Path
    action_list: Path


def make_ava(
    folder: Path, split: str, *, films: int = 2, seconds: int = SECONDS, seed: int = 0
) -> AvaSet:
    """Films, annotations, shaken person boxes (score 0.95; junk of 0.3) and shards of a split."""
    shards, videos = folder / f"{split}-shards", folder / f"{split}-videos"
    annotations, detections = folder / f"ava_{split}.csv", folder / f"persons_{split}.csv"
    made = AvaSet(shards, annotations, detections, folder / "actions.pbtxt")
    if (shards / MANIFEST).exists():
        return made
    videos.mkdir(parents=True)
    rows, persons = [], []
    for film in range(films):
        generator = np.random.default_rng((seed, film))
        name = f"film_{split}{film}"
        frames, boxes = render(seconds, generator)
        data = encode(
            (_frame(picture) for picture in frames),
            rate=Fraction(RATE),
            settings=TranscodeSettings(short_side=0, gop=8, crf=8),
        )
        (videos / f"{name}.mp4").write_bytes(data)
        for second, box, actions in boxes:
            place = f"{name},{FIRST_SECOND + second:04d}"
            rows += [f"{place},{_text(box)},{action},0" for action in actions]
            shaken = np.clip(box + generator.uniform(-0.01, 0.01, 4), 0, 1)
            persons += [f"{place},{_text(shaken)},0.95", f"{place},0.0,0.0,0.2,0.2,0.3"]
    annotations.write_text("\n".join(rows) + "\n")
    detections.write_text("\n".join(persons) + "\n")
    made.action_list.write_text(ACTION_LIST)
    source = Source(videos, annotations, first_second=FIRST_SECOND, window_s=2.0)
    write_shards(
        ShardJob(
            dataset="ava",
            split=split,
            listing=read_listing("ava", source),
            output=shards,
            transcode=TranscodeSettings(short_side=0, gop=8, crf=8),
            samples_per_shard=32,
            seed=0,
            workers=1,
            timeout_s=60,
        )
    )
    return made


def render(
    seconds: int, generator: np.random.Generator
) -> tuple[np.ndarray, list[tuple[int, np.ndarray, list[int]]]]:
    """Frames (uint8, F H W 3), and of each second from 2 on its box (0..1) and actions.

    Every second is a scene of its own: another square, its middle frame the keyframe.
    """
    frames = np.full((seconds * RATE + RATE, HEIGHT, WIDTH, 3), 40, dtype=np.uint8)
    boxes = []
    for second in range(2, seconds):
        red, down = generator.integers(2, size=2)
        colour = (220, 30, 30) if red else (30, 30, 220)
        room = np.array([WIDTH, HEIGHT]) - SIDE
        middle = generator.uniform(0.25 * room, 0.75 * room)
        step = np.array([0.0, 1.5]) if down else np.array([1.5, 0.0])
        for offset in range(-RATE // 2, RATE // 2):
            left, top = (middle + offset * step).round().astype(int).clip(0, room)
            frames[second * RATE + offset, top : top + SIDE, left : left + SIDE] = colour
        left, top = middle.round()
        corners = np.array([left, top, left + SIDE, top + SIDE])
        actions = [RED if red else BLUE, *([DOWN] if down else [])]
        boxes.append((second, corners / np.array([WIDTH, HEIGHT, WIDTH, HEIGHT]), actions))
    return frames, boxes


def _frame(picture: np.ndarray) -> av.VideoFrame:
    return av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")


def _text(box: np.ndarray) -> str:
    return ",".join(f"{side:.3f}" for side in box)
