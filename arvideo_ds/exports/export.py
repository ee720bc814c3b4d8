"""Export a run to a folder in one of the formats, and compare the opened export with the run.

DIR/
  ...            the model in the format's own files (a module each)
  parity.json    differences of its outputs from the run's, on which clips, with which versions
  README.md      model card
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from arvideo_ds.config import EncoderRecipe
from arvideo_ds.data.clips import EvaluationClips
from arvideo_ds.errors import UserError
from arvideo_ds.exports import FORMATS, UNSPECIFIED
from arvideo_ds.exports.card import in_words, model_card
from arvideo_ds.exports.source import ExportSource, OpenedExport, outputs
from arvideo_ds.files.atomic import write_json
from arvideo_ds.shards.manifest import ShardSet

NUM_CLIPS = 4
# Share of the largest value: float32 through dozens of layers, in another order of operations.
LIMIT = 1e-3


@dataclass(frozen=True)
class ParityClips:
    """values: B T H W 3, uint8. origin: a description for parity.json."""

    values: Tensor
    origin: str


def export(
    source: ExportSource,
    format_name: str,
    output: Path,
    clips: ParityClips,
    *,
    license_id: str = UNSPECIFIED,
) -> dict[str, object]:
    """Export into `output`, which appears once the export computes the same as the run.

    license_id: of the weights, for the model card. Returns the contents of parity.json. Errors:
    `UserError` where the folder is in use, the format does not support this model, or the outputs
    differ.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} is there already; choose another --output, or remove it.")
    partial = output.parent / f".partial-{output.name}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        opened = FORMATS[format_name](source, partial)
        parity = _compare(source, opened, clips)
        write_json(partial / "parity.json", parity)
        card = model_card(source, output.name, opened, parity, license_id=license_id)
        (partial / "README.md").write_text(card, encoding="utf-8")
        partial.replace(output)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error}.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return parity


def clips_of(shards: ShardSet, recipe: EncoderRecipe, count: int = NUM_CLIPS) -> ParityClips:
    """Central clips of videos spread over the shards. Errors: `UserError` if none decodes."""
    videos = EvaluationClips(shards, recipe)
    step = max(1, len(videos) // count)
    chosen = [videos[number] for number in range(0, len(videos), step)][:count]
    clips = [video.clips[0] for video in chosen if video.skipped is None]
    if not clips:
        raise UserError(f"none of {len(chosen)} videos of {shards.name} could be decoded.")
    return ParityClips(torch.stack(clips), f"central clips of {len(clips)} videos of {shards.hash}")


def random_clips(recipe: EncoderRecipe, count: int = NUM_CLIPS) -> ParityClips:
    """Clips of seeded random pixels."""
    generator = torch.Generator().manual_seed(0)
    shape = (count, *recipe.geometry.clip, 3)
    values = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    return ParityClips(values, f"{count} clips of random pixels")


def _compare(source: ExportSource, opened: OpenedExport, clips: ParityClips) -> dict[str, object]:
    """Largest differences of every output of the export, for parity.json.

    Errors: `UserError` where one is above `LIMIT` of the run's largest value (at least of 1).
    """
    ours, theirs = outputs(source, clips.values), opened.run(clips.values)
    differences, largest = {}, {}
    for name, value in theirs.items():
        differences[name] = (value.float() - ours[name]).abs().max().item()
        largest[name] = ours[name].abs().max().item()
        if not differences[name] <= LIMIT * max(1.0, largest[name]):  # NaN is refused too
            raise UserError(
                f"the exported model is wrong: its {name} differ from the run's by "
                f"{differences[name]:g} (largest value {largest[name]:g}) on {clips.origin}. "
                f"Nothing was written. Versions: {in_words(opened.versions)}."
            )
    return {
        "max_abs_difference": differences,
        "largest_value": largest,
        "clips": clips.origin,
        "versions": opened.versions,
    }
