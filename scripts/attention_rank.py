#!/usr/bin/env python3
"""Rank of the attention maps of encoders, layer by layer (ARVideo, Figure 3): docs/attention.md.

    python scripts/attention_rank.py runs/demo untrained:runs/demo --shards data/demo/test \\
        --output runs/demo/attention
    python scripts/attention_rank.py runs/arvideo runs/videomae videomae.pth --shards SHARDS \\
        --output attention --threshold 0.1 0.01 0.001

An ENCODER is the folder of a finished run or of an export, untrained:RUN for the weights that a
pretraining run began with, or any file of weights that --init-from takes. All see the same clips,
cut as the first one's recipe says, which also stands in where weights come without a recipe.

Writes OUTPUT/attention_rank.json and .png, prints a table. What is measured is kept in
OUTPUT/spectra: the same command goes on after Ctrl-C (exit code 75), and another threshold takes
seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from arvideo_ds.arguments import CommandParser
from arvideo_ds.config import PretrainRecipe, Recipe, load_recipe
from arvideo_ds.data.loader import worker_count
from arvideo_ds.errors import EXIT_INTERRUPTED, UserError, command
from arvideo_ds.evaluation.attention import (
    Clips,
    Statistics,
    effective_rank,
    evenly,
    measured_spectra,
    rank,
    statistics,
)
from arvideo_ds.evaluation.pretrained import untrained
from arvideo_ds.files.atomic import write_json
from arvideo_ds.host import available_cores
from arvideo_ds.models.encoder import Encoder, build_encoder
from arvideo_ds.models.layouts import load_encoder
from arvideo_ds.runs import run_folder
from arvideo_ds.shards.manifest import ShardSet

EFFECTIVE = "effective rank"
_UNTRAINED = "untrained:"
# Far above what float32 leaves uncertain in a singular value, relative to the largest.
_LEAST_THRESHOLD = 1e-5


@dataclass(frozen=True)
class Opened:
    name: str
    source: str
    recipe: Recipe
    encoder: Encoder


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    parser.add_argument("encoders", nargs="+", metavar="ENCODER")
    parser.add_argument("--shards", required=True, help="the clips' shards; labels do not matter")
    parser.add_argument("--output", required=True, type=Path, help="folder")
    parser.add_argument("--clips", type=int, default=64, help="spread over the shards")
    parser.add_argument(
        "--threshold",
        type=float,
        nargs="+",
        default=[0.01],
        help="a singular value counts above this share of the largest; default 0.01",
    )
    parser.add_argument("--recipe", help="of weights without one; default: the first run's")
    return parser.parse_args()


@command
def main() -> int:
    args = parse_arguments()
    if args.clips < 1:
        raise UserError(f"--clips {args.clips} must be 1 or more.")
    for threshold in args.threshold:
        if not _LEAST_THRESHOLD <= threshold < 1:
            raise UserError(
                f"--threshold {threshold:g} must be at least {_LEAST_THRESHOLD:g}, below which "
                "singular values are rounding, and below 1, the largest one's share of itself."
            )
    if args.output.exists() and not args.output.is_dir():
        raise UserError(f"--output {args.output} is a file; give a folder.")
    encoders = open_encoders(args.encoders, args.recipe)
    require_same_clips(encoders)
    shards, recipe = ShardSet(args.shards), encoders[0].recipe
    numbers = evenly(shards.num_samples, min(args.clips, shards.num_samples))
    workers = worker_count(recipe, cores=len(available_cores()))
    clips = Clips(shards, numbers, recipe, workers)
    with run_folder.lock(args.output):
        try:
            measured = measure(encoders, clips, args.output / "spectra")
        except KeyboardInterrupt:
            print("interrupted; the same command goes on", file=sys.stderr, flush=True)
            return EXIT_INTERRUPTED
        write(args, encoders, clips, measured)
    return 0


def open_encoders(sources: Sequence[str], recipe_name: str | None) -> list[Opened]:
    """Each source with its recipe, or the fallback's. Errors: `UserError` where there is none."""
    folders = [Path(source.removeprefix(_UNTRAINED)) for source in sources]
    own = [_recipe_beside(source, folder) for source, folder in zip(sources, folders, strict=True)]
    fallback: Recipe | None = (
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


def _recipe_beside(source: str, folder: Path) -> Recipe | None:
    if not (folder / run_folder.RECIPE).is_file():
        return None
    if source.startswith(_UNTRAINED):
        return run_folder.read_recipe(folder, PretrainRecipe)
    return run_folder.read_recipe(folder, *run_folder.WITH_ENCODER)


def open_encoder(source: str, recipe: Recipe) -> Encoder:
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


def _shape(recipe: Recipe) -> str:
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


def write(
    args: argparse.Namespace,
    encoders: Sequence[Opened],
    clips: Clips,
    measured: dict[str, Tensor],
) -> None:
    # Only now: it takes a second to load.
    from arvideo_ds.evaluation.attention_pictures import draw_ranks

    panels = {
        f"rank (singular values > {threshold:g} x largest)": {
            name: statistics(rank(spectra, threshold)) for name, spectra in measured.items()
        }
        for threshold in args.threshold
    }
    panels[EFFECTIVE] = {
        name: statistics(effective_rank(spectra)) for name, spectra in measured.items()
    }
    document = {
        "shards": clips.shards.name,
        "manifest": clips.shards.hash,
        "clips": {name: len(spectra) for name, spectra in measured.items()},
        "tokens": clips.recipe.geometry.num_tokens,
        "thresholds": args.threshold,
        "encoders": {opened.name: opened.source for opened in encoders},
        "measures": {
            title: {name: dataclasses.asdict(found) for name, found in rows.items()}
            for title, rows in panels.items()
        },
    }
    path = args.output / "attention_rank.json"
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


if __name__ == "__main__":
    sys.exit(main())
