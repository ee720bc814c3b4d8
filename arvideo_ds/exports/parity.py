"""Does the exported model compute what ours does? Measured on clips, opened from its files."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from arvideo_ds.config import EncoderRecipe
from arvideo_ds.data.clips import EvaluationClips
from arvideo_ds.errors import UserError
from arvideo_ds.exports.opened import Opened
from arvideo_ds.exports.source import Source, outputs
from arvideo_ds.shards.manifest import ShardSet

NUM_CLIPS = 4
# Of the largest value: float32 through dozens of layers, in another order of operations.
LIMIT = 1e-3


@dataclass(frozen=True)
class Clips:
    """values: B T H W 3, uint8. origin: what they are, for parity.json."""

    values: Tensor
    origin: str


def clips_of(shards: ShardSet, recipe: EncoderRecipe, count: int = NUM_CLIPS) -> Clips:
    """Central clips of videos from all over the shards. Errors: `UserError` if none decodes."""
    videos = EvaluationClips(shards, recipe)
    step = max(1, len(videos) // count)
    found = [videos[number] for number in range(0, len(videos), step)][:count]
    clips = [video.clips[0] for video in found if video.skipped is None]
    if not clips:
        raise UserError(f"none of {len(found)} videos of {shards.name} could be decoded.")
    return Clips(torch.stack(clips), f"central clips of {len(clips)} videos of {shards.hash}")


def random_clips(recipe: EncoderRecipe, count: int = NUM_CLIPS) -> Clips:
    """Seeded noise, where no shards are at hand."""
    generator = torch.Generator().manual_seed(0)
    shape = (count, *recipe.geometry.clip, 3)
    values = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    return Clips(values, f"{count} clips of random pixels")


def compare(source: Source, opened: Opened, clips: Clips) -> dict[str, object]:
    """Largest differences of every output that both have, for parity.json.

    Errors: `UserError` where one is above `LIMIT` of the largest value of ours (of 1 at least).
    """
    ours, theirs = outputs(source, clips.values), opened.run(clips.values)
    differences, largest = {}, {}
    for name, value in theirs.items():
        differences[name] = (value.float() - ours[name]).abs().max().item()
        largest[name] = ours[name].abs().max().item()
        if not differences[name] <= LIMIT * max(1.0, largest[name]):  # not a number is too far
            raise UserError(
                f"the exported model is wrong: its {name} differ from ours by {differences[name]:g}"
                f" (largest value {largest[name]:g}) on {clips.origin}. Nothing was written. "
                f"Versions: {_in_words(opened.versions)}."
            )
    return {
        "max_abs_difference": differences,
        "largest_value": largest,
        "clips": clips.origin,
        "versions": opened.versions,
    }


def _in_words(versions: dict[str, str]) -> str:
    return ", ".join(f"{package} {version}" for package, version in versions.items())
