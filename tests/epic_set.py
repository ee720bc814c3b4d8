"""A small EPIC-KITCHENS: films of moving squares, a CSV of actions with verb and noun, shards."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from arvideo_ds.decoding.video import TranscodeSettings, encode
from arvideo_ds.shards.datasets import Source, read_listing
from arvideo_ds.shards.manifest import MANIFEST
from arvideo_ds.shards.writer import ShardJob, write_shards

COLUMNS = (
    "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,"
    "start_frame,stop_frame,narration,verb,verb_class,noun,noun_class,all_nouns,all_noun_classes"
)
VERBS, NOUNS = ("take", "put", "wash"), ("cup", "lid", "pan", "tap")
_RATE, _FRAMES, _SIDE = Fraction(50), 24, 64


def make_epic(folder: Path, split: str, films: int) -> Path:
    """Shards of two actions of each film, below `folder`: sample n has verb n % 3, noun n % 4."""
    if (folder / split / MANIFEST).exists():
        return folder / split
    videos = folder / f"{split}-films"
    videos.mkdir()
    rows = [COLUMNS]
    for film in range(films):
        name = f"{split}_{film:02d}"
        pictures = _pictures(film)
        settings = TranscodeSettings(short_side=0)
        (videos / f"{name}.MP4").write_bytes(encode(pictures, rate=_RATE, settings=settings))
        for part in range(2):
            n = 2 * film + part
            times = f"00:00:00.{24 * part:02d},00:00:00.{24 * part + 24:02d}"
            verb, noun = n % len(VERBS), n % len(NOUNS)
            rows.append(
                f"{name}_{part},P01,{name},00:00:00.00,{times},0,0,do it,{VERBS[verb]},{verb},"
                f'{NOUNS[noun]},{noun},"[\'{NOUNS[noun]}\']","[{noun}]"'
            )
    paths = {"list": folder / f"{split}.csv", "verbs": folder / "v.csv", "nouns": folder / "n.csv"}
    paths["list"].write_text("\n".join(rows) + "\n")
    for key, names in (("verbs", VERBS), ("nouns", NOUNS)):
        lines = [f"{number},{name}" for number, name in enumerate(names)]
        paths[key].write_text("\n".join(["id,key", *lines]) + "\n")
    source = Source(videos, paths["list"], labels=paths["verbs"], nouns=paths["nouns"])
    write_shards(
        ShardJob(
            dataset="epic_kitchens",
            split=split,
            listing=read_listing("epic_kitchens", source),
            output=folder / split,
            transcode=TranscodeSettings(short_side=0),
            samples_per_shard=8,
            seed=0,
            workers=1,
            timeout_s=600,
        )
    )
    return folder / split


def _pictures(film: int) -> Iterator[av.VideoFrame]:
    for frame in range(_FRAMES):
        picture = np.full((_SIDE, _SIDE, 3), 40, np.uint8)
        place = (3 * film + 2 * frame) % (_SIDE - 12)
        picture[place : place + 12, 8 * (film % 4) : 8 * (film % 4) + 12] = 220
        yield av.VideoFrame.from_ndarray(picture, "rgb24").reformat(format="yuv420p")
