"""Encoders compared by the rank of their attention maps (ARVideo, Figure 3).

An encoder is the folder of a finished run or of an export, untrained:RUN for the initial weights of
a pretraining run, or any file of weights that --init-from takes.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
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

_UNTRAINED = "untrained:"


@dataclass(frozen=True)
class NamedEncoder:
    """An encoder, its name in the report, where it came from, and its recipe."""

    name: str
    source: str
    recipe: EncoderRecipe
    encoder: Encoder


def open_encoders(sources: Sequence[str], recipe_name: str | None) -> list[NamedEncoder]:
    """Open each source by its own recipe, or by the fallback: `recipe_name`, else the first recipe.

    Errors: `UserError` where a source has neither, is given twice or cannot be loaded.
    """
    recipes = [_recipe_beside(source) for source in sources]
    fallback: EncoderRecipe | None = (
        load_recipe(recipe_name) if recipe_name else next(filter(None, recipes), None)
    )
    opened = []
    for source, name, beside in zip(sources, _names(sources), recipes, strict=True):
        recipe = beside or fallback
        if recipe is None:
            raise UserError(
                f"{source} has no recipe.yaml beside it, and no other encoder has one. Give the "
                "recipe with --recipe, such as --recipe pretrain_vit_b_k400."
            )
        opened.append(NamedEncoder(name, source, recipe, _open(source, recipe)))
    return opened


def _folder(source: str) -> Path:
    return Path(source.removeprefix(_UNTRAINED))


def _recipe_beside(source: str) -> EncoderRecipe | None:
    if not (_folder(source) / run_folder.RECIPE).is_file():
        return None
    kind = PretrainRecipe if source.startswith(_UNTRAINED) else EncoderRecipe
    return run_folder.read_recipe(_folder(source), kind)


def _open(source: str, recipe: EncoderRecipe) -> Encoder:
    if source.startswith(_UNTRAINED):
        return untrained(run_folder.read_recipe(_folder(source), PretrainRecipe)).encoder
    encoder = build_encoder(recipe.encoder)
    print(load_encoder(encoder, source, patch=recipe.patch), file=sys.stderr)
    return encoder


def _names(sources: Sequence[str]) -> list[str]:
    """The last part of each path, or the whole source where two would have the same name."""
    for source, times in Counter(sources).items():
        if times > 1:
            raise UserError(f"{source} is given {times} times; give each encoder once.")
    short = [
        "untrained " * source.startswith(_UNTRAINED) + _folder(source).resolve().name
        for source in sources
    ]
    return [
        name if short.count(name) == 1 else source
        for name, source in zip(short, sources, strict=True)
    ]


def require_same_clips(encoders: Sequence[NamedEncoder]) -> None:
    """Errors: `UserError` where clips or patches differ."""
    first = encoders[0]
    for other in encoders[1:]:
        if _shape(other.recipe) != _shape(first.recipe):
            raise UserError(
                f"{other.source} sees clips of {_shape(other.recipe)}, {first.source} of "
                f"{_shape(first.recipe)}: a map's rank is at most its number of tokens, so ranks "
                "of different clips or patches cannot be compared. Compare encoders of one "
                "data.frames, data.size and model.patch."
            )


def _shape(recipe: EncoderRecipe) -> str:
    clip, patch = ("x".join(map(str, n)) for n in (recipe.geometry.clip, recipe.patch))
    return f"{clip} in cubes of {patch} ({recipe.geometry.num_tokens} tokens)"


def measure(encoders: Sequence[NamedEncoder], clips: Clips, cache: Path) -> dict[str, Tensor]:
    """Spectra of each encoder by its name, clips L h N."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    measured = {}
    for named in encoders:
        measured[named.name], skipped = measured_spectra(
            named.encoder, clips, device, cache, name=f"attention of {named.name}"
        )
        if skipped:
            print(f"{skipped} clips did not decode and are skipped", file=sys.stderr)
    return measured


def write_report(
    output: Path,
    encoders: Sequence[NamedEncoder],
    clips: Clips,
    measured: dict[str, Tensor],
    thresholds: Sequence[float],
) -> None:
    """Write attention_rank.json and .png to `output`, and print the table."""
    tokens = clips.recipe.geometry.num_tokens
    values = {
        f"rank (singular values > {threshold:g} x largest)": {
            name: rank(spectra, threshold) for name, spectra in measured.items()
        }
        for threshold in thresholds
    }
    values["effective rank"] = {name: effective_rank(spectra) for name, spectra in measured.items()}
    panels = {
        title: {name: statistics(ranks) for name, ranks in rows.items()}
        for title, rows in values.items()
    }
    document = {
        "shards": clips.shards.name,
        "manifest": clips.shards.hash,
        "clips": {name: len(spectra) for name, spectra in measured.items()},
        "tokens": tokens,
        "thresholds": list(thresholds),
        "encoders": {named.name: named.source for named in encoders},
        "measures": {
            title: {name: dataclasses.asdict(row) for name, row in rows.items()}
            for title, rows in panels.items()
        },
    }
    path = output / "attention_rank.json"
    write_json(path, document)
    draw_ranks(panels, tokens).savefig(path.with_suffix(".png"), dpi=130)
    count = min(len(spectra) for spectra in measured.values())
    print(f"{count} clips of {clips.shards.name}, {tokens} tokens each")
    for title, rows in panels.items():
        print("\n" + "\n".join(_table(title, rows)))
    print(f"\n{path}, {path.with_suffix('.png')}")


def _table(title: str, rows: Mapping[str, Statistics]) -> list[str]:
    """Markdown: a row for each encoder, a column for each layer; mean and deviation."""
    depth = max(len(row.mean) for row in rows.values())
    layers = " | ".join(f"layer {number}" for number in range(1, depth + 1))
    lines = [f"| {title} | {layers} |", "|---" * (depth + 1) + "|"]
    for name, row in rows.items():
        cells = [f"{m:.1f} ± {d:.1f}" for m, d in zip(row.mean, row.deviation, strict=True)]
        lines.append(f"| {name} | {' | '.join(cells + [''] * (depth - len(cells)))} |")
    return lines


def draw_ranks(panels: Mapping[str, Mapping[str, Statistics]], num_tokens: int) -> Figure:
    """A panel for each measure with a line for each encoder: mean and one standard deviation.

    panels: title -> encoder -> its statistics. num_tokens: the upper bound of a rank.
    """
    figure = Figure(figsize=(4.6 * len(panels), 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, encoders) in zip(axes, panels.items(), strict=True):
        for name, row in encoders.items():
            mean, deviation = np.array(row.mean), np.array(row.deviation)
            layers = 1 + np.arange(len(mean))
            (line,) = axis.plot(layers, mean, marker="o", markersize=4, label=name)
            axis.fill_between(
                layers, mean - deviation, mean + deviation, color=line.get_color(), alpha=0.15
            )
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("layer")
        axis.set_ylim(bottom=0)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(f"of {num_tokens} tokens")
    axes[0].legend(frameon=False, fontsize=9)
    figure.supxlabel("mean and one standard deviation over heads and clips", fontsize=9)
    return figure
