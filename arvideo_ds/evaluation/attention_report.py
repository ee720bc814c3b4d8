"""Encoders compared by the rank of their attention maps (ARVideo, Figure 3): open, measure, report.

An encoder is the folder of a finished run or of an export, untrained:RUN for the weights that a
pretraining run began with, or any file of weights that --init-from takes.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from arvideo_ds.config import EncoderRecipe, PretrainRecipe, load_recipe
from arvideo_ds.errors import UserError
from arvideo_ds.evaluation.attention import (
    Clips,
    Statistics,
    effective_rank,
    measured_spectra,
    rank,
    statistics,
)
from arvideo_ds.evaluation.pretrained import untrained
from arvideo_ds.files.atomic import write_json
from arvideo_ds.models.encoder import Encoder, build_encoder
from arvideo_ds.models.layouts import load_encoder
from arvideo_ds.runs import run_folder

EFFECTIVE = "effective rank"
_UNTRAINED = "untrained:"


@dataclass(frozen=True)
class Opened:
    """An encoder with the recipe that it is read by."""

    name: str
    source: str
    recipe: EncoderRecipe
    encoder: Encoder


def open_encoders(sources: Sequence[str], recipe_name: str | None) -> list[Opened]:
    """Each source with its recipe, or the fallback's. Errors: `UserError` where there is none."""
    folders = [Path(source.removeprefix(_UNTRAINED)) for source in sources]
    own = [_recipe_beside(source, folder) for source, folder in zip(sources, folders, strict=True)]
    fallback: EncoderRecipe | None = (
        load_recipe(recipe_name) if recipe_name else next((r for r in own if r is not None), None)
    )
    opened = []
    for source, name, beside in zip(sources, names_of(sources), own, strict=True):
        recipe = beside or fallback
        if recipe is None:
            raise UserError(
                f"{source} has no recipe.yaml beside it, and no other encoder has one: say what "
                "it is by --recipe, such as --recipe pretrain_vit_b_k400."
            )
        opened.append(Opened(name, source, recipe, open_encoder(source, recipe)))
    return opened


def _recipe_beside(source: str, folder: Path) -> EncoderRecipe | None:
    if not (folder / run_folder.RECIPE).is_file():
        return None
    if source.startswith(_UNTRAINED):
        return run_folder.read_recipe(folder, PretrainRecipe)
    return run_folder.read_recipe(folder, EncoderRecipe)


def open_encoder(source: str, recipe: EncoderRecipe) -> Encoder:
    if not source.startswith(_UNTRAINED):
        encoder = build_encoder(recipe.encoder)
        print(load_encoder(encoder, source, patch=recipe.patch), file=sys.stderr)
        return encoder
    folder = Path(source.removeprefix(_UNTRAINED))
    return untrained(run_folder.read_recipe(folder, PretrainRecipe)).encoder


def names_of(sources: Sequence[str]) -> list[str]:
    """The last part of each path, or all of it where that would be the same twice."""
    short = [
        ("untrained " if source.startswith(_UNTRAINED) else "")
        + Path(source.removeprefix(_UNTRAINED)).resolve().name
        for source in sources
    ]
    for source, times in Counter(sources).items():
        if times > 1:
            raise UserError(f"{source} is given {times} times; give each encoder once.")
    return [
        name if short.count(name) == 1 else source
        for name, source in zip(short, sources, strict=True)
    ]


def require_same_clips(encoders: Sequence[Opened]) -> None:
    """Errors: `UserError` where clips or patches differ."""
    first = encoders[0]
    for other in encoders[1:]:
        if (other.recipe.geometry.clip, other.recipe.patch) != (
            first.recipe.geometry.clip,
            first.recipe.patch,
        ):
            raise UserError(
                f"{other.source} sees clips of {_shape(other.recipe)}, {first.source} of "
                f"{_shape(first.recipe)}: a map's rank is at most its number of tokens, so ranks "
                "of different clips or patches cannot be compared. Compare encoders of one "
                "data.frames, data.size and model.patch."
            )


def _shape(recipe: EncoderRecipe) -> str:
    clip, patch = ("x".join(map(str, n)) for n in (recipe.geometry.clip, recipe.patch))
    return f"{clip} in cubes of {patch} ({recipe.geometry.num_tokens} tokens)"


def measure(encoders: Sequence[Opened], clips: Clips, cache: Path) -> dict[str, Tensor]:
    """Spectra of each encoder by its name, clips L h N."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    measured = {}
    for opened in encoders:
        spectra, skipped = measured_spectra(
            opened.encoder, clips, device, cache, name=f"attention of {opened.name}"
        )
        measured[opened.name] = spectra
        if skipped:
            print(f"{skipped} clips did not decode and are left out", file=sys.stderr)
    return measured


def write_report(
    output: Path,
    encoders: Sequence[Opened],
    clips: Clips,
    measured: dict[str, Tensor],
    thresholds: Sequence[float],
) -> None:
    """Write attention_rank.json and .png to `output`, and print the table."""
    # Only now: it takes a second to load.
    from arvideo_ds.evaluation.attention_pictures import draw_ranks

    panels = {
        f"rank (singular values > {threshold:g} x largest)": {
            name: statistics(rank(spectra, threshold)) for name, spectra in measured.items()
        }
        for threshold in thresholds
    }
    panels[EFFECTIVE] = {
        name: statistics(effective_rank(spectra)) for name, spectra in measured.items()
    }
    document = {
        "shards": clips.shards.name,
        "manifest": clips.shards.hash,
        "clips": {name: len(spectra) for name, spectra in measured.items()},
        "tokens": clips.recipe.geometry.num_tokens,
        "thresholds": list(thresholds),
        "encoders": {opened.name: opened.source for opened in encoders},
        "measures": {
            title: {name: dataclasses.asdict(found) for name, found in rows.items()}
            for title, rows in panels.items()
        },
    }
    path = output / "attention_rank.json"
    write_json(path, document)
    figure = draw_ranks(panels, clips.recipe.geometry.num_tokens)
    figure.savefig(path.with_suffix(".png"), dpi=130)
    count = min(len(spectra) for spectra in measured.values())
    print(f"{count} clips of {clips.shards.name}, {clips.recipe.geometry.num_tokens} tokens each")
    for title, rows in panels.items():
        print("\n" + "\n".join(table(title, rows)))
    print(f"\n{path}, {path.with_suffix('.png')}")


def table(title: str, rows: dict[str, Statistics]) -> list[str]:
    """Markdown: a row for each encoder, a column for each layer; mean and deviation."""
    depth = max(len(found.mean) for found in rows.values())
    layers = " | ".join(f"layer {number}" for number in range(1, depth + 1))
    lines = [f"| {title} | {layers} |", "|---" * (depth + 1) + "|"]
    for name, found in rows.items():
        cells = [
            f"{mean:.1f} ± {deviation:.1f}"
            for mean, deviation in zip(found.mean, found.deviation, strict=True)
        ]
        lines.append(f"| {name} | {' | '.join(cells + [''] * (depth - len(cells)))} |")
    return lines
