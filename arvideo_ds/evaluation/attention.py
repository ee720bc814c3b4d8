"""Rank of the attention maps of encoders, layer by layer (ARVideo, Figure 3).

A map is softmax(q k' / sqrt(d)), one per head and clip, under full attention on the whole clip. Its
rank is at most its number of tokens; a head whose tokens all attend alike has rank 1.

rank: singular values above a threshold x the largest. Neither ARVideo, which plots the rank, nor
Linformer, which it follows, reports a threshold, and a softmax of real numbers nearly always has
full rank. So every rank is reported with its threshold, beside the effective rank, which has none.

B clips, L layers, h heads, N tokens, d width of a head, D of the encoder.
Source: ARVideo (arXiv 2405.15160), section 4.2 and Figure 3; Linformer (arXiv 2006.04768),
section 3; effective rank: Roy and Vetterli 2007, EUSIPCO, definition 1.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from einops import rearrange
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from tqdm import tqdm

from arvideo_ds.config import EncoderRecipe, PretrainRecipe, load_recipe
from arvideo_ds.data.loader import evaluation_loader
from arvideo_ds.errors import UserError
from arvideo_ds.evaluation.pretrained import untrained
from arvideo_ds.files.atomic import replacing, write_json
from arvideo_ds.geometry import Triple
from arvideo_ds.models.encoder import Encoder, build_encoder, encode_clips
from arvideo_ds.models.layouts import load_encoder
from arvideo_ds.runs import run_folder
from arvideo_ds.shards.manifest import ShardSet

# The settings of `data` that decide which pixels the encoders see.
_CLIP_SETTINGS = {"frames", "size", "stride", "fps", "sampling"}
_UNTRAINED = "untrained:"


def attention_map(attention: Any, x: Tensor) -> Tensor:
    """The map B h N N (float64) of a timm `Attention` without a mask, from x B N D.

    The block's own attention is fused and never computes this matrix.
    """
    q, k, _ = rearrange(
        attention.qkv(x), "b n (three h d) -> three b h n d", three=3, h=attention.num_heads
    )
    q, k = attention.q_norm(q), attention.k_norm(k)
    scores = attention.scale * q.double() @ k.double().transpose(-2, -1)
    return scores.softmax(-1)


@torch.no_grad()
def attention_spectra(encoder: Encoder, clips: Tensor, patch: Triple) -> Tensor:
    """Singular values of every map, the largest first: clips B T H W 3 -> B L h N, float64.

    One layer's maps, B h N N, are in memory at a time.
    """
    spectra: list[Tensor] = []

    def reduce(attention: Any, inputs: tuple[Tensor]) -> None:
        spectra.append(torch.linalg.svdvals(attention_map(attention, inputs[0])))

    hooks = [a.register_forward_pre_hook(reduce) for a in _attentions(encoder)]
    try:
        encode_clips(encoder, clips, patch)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(spectra, dim=1)


def _attentions(encoder: Encoder) -> list[Any]:
    # The items of an nn.ModuleList have no type.
    blocks: Any = encoder.blocks
    return [block.attn for block in blocks]


def rank(spectra: Tensor, threshold: float) -> Tensor:
    """How many singular values (last axis, the largest first) are above threshold x the largest."""
    return (spectra > threshold * spectra[..., :1]).sum(-1)


def effective_rank(spectra: Tensor) -> Tensor:
    """exp of the entropy of the singular values (last axis) as shares of their sum: 1 to N."""
    shares = spectra / spectra.sum(-1, keepdim=True)
    return torch.special.entr(shares).sum(-1).exp()


class Statistics(TypedDict):
    """Mean and deviation of a measure over clips and heads, L each, and means of heads, L h."""

    mean: list[float]
    deviation: list[float]
    heads: list[list[float]]


def statistics(values: Tensor) -> Statistics:
    """values: clips L h."""
    values = values.double()
    return Statistics(
        mean=values.mean((0, 2)).tolist(),
        deviation=values.std((0, 2), correction=0).tolist(),
        heads=values.mean(0).tolist(),
    )


@dataclass(frozen=True)
class Clips:
    """The central clips of the samples `numbers` of shards, cropped by one recipe."""

    shards: ShardSet
    numbers: list[int]
    recipe: EncoderRecipe
    num_workers: int


def evenly(total: int, count: int) -> list[int]:
    """`count` of the sample numbers 0..total-1, evenly spread: shards are often sorted by class."""
    return [number * total // count for number in range(count)]


def measured_spectra(
    encoder: Encoder, clips: Clips, device: torch.device, cache: Path, *, name: str
) -> tuple[Tensor, int]:
    """Spectra of all clips that decode, clips L h N, float32, and how many did not.

    `cache` keeps a file per clip below the hash of encoder and clips, which later calls read.
    Errors: `UserError` if no clip decodes.
    """
    folder = cache / _identity(encoder, clips)
    folder.mkdir(parents=True, exist_ok=True)
    files = {number: folder / f"{number:06d}.npy" for number in clips.numbers}
    missing = [[number] for number, file in files.items() if not file.exists()]
    encoder = encoder.to(device).eval()
    workers = min(clips.num_workers, len(missing))
    loader = evaluation_loader(clips.shards, clips.recipe, missing, num_workers=workers)
    done = len(files) - len(missing)
    for batch in tqdm(loader, name, total=len(files), initial=done, unit="clip"):
        if bool(batch.valid):
            moved = batch.to(device)
            spectra = attention_spectra(encoder, moved.clips, clips.recipe.patch)
            with replacing(files[int(batch.keys)]) as unfinished, unfinished.open("wb") as file:
                np.save(file, spectra[0].float().cpu().numpy())
    measured = [_load(file) for file in files.values() if file.exists()]
    if not measured:
        raise UserError(
            f"none of the {len(files)} clips of {clips.shards.name} decoded: "
            "`arvideo verify` reports why."
        )
    return torch.stack(measured), len(files) - len(measured)


def _load(path: Path) -> Tensor:
    try:
        return torch.from_numpy(np.load(path))
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{path} is damaged ({error}); delete it, and the same command measures it again."
        ) from None


def _identity(encoder: Encoder, clips: Clips) -> str:
    """Hash of everything that decides the spectra of a sample number."""
    digest = hashlib.sha256(clips.shards.hash.encode())
    data = clips.recipe.data
    settings = data.model_dump(mode="json", include=_CLIP_SETTINGS, exclude_none=True)
    heads = [attention.num_heads for attention in _attentions(encoder)]
    digest.update(json.dumps([settings, clips.recipe.patch, heads]).encode())
    # Positions are not in the state: they are recomputed from the recipe.
    for name, value in {**encoder.state_dict(), "positions": encoder.positions}.items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class NamedEncoder:
    """An encoder, its name in the report, its source, and its recipe.

    source: the folder of a finished run or of an export, untrained:RUN for the initial weights of a
    pretraining run, or any file of weights that --init-from takes.
    """

    name: str
    source: str
    recipe: EncoderRecipe
    encoder: Encoder


def open_encoders(sources: Sequence[str], recipe_name: str | None) -> list[NamedEncoder]:
    """Open each source by its own recipe, or by the fallback: `recipe_name`, else the first recipe.

    Errors: `UserError` where a source has neither, is given twice or cannot be loaded.
    """
    names, recipes = _names(sources), [_recipe_beside(source) for source in sources]
    fallback: EncoderRecipe | None = (
        load_recipe(recipe_name) if recipe_name else next(filter(None, recipes), None)
    )
    opened = zip(names, sources, (recipe or fallback for recipe in recipes), strict=True)
    return [_open(*each) for each in opened]


def _folder(source: str) -> Path:
    return Path(source.removeprefix(_UNTRAINED))


def _recipe_beside(source: str) -> EncoderRecipe | None:
    if not (_folder(source) / run_folder.RECIPE).is_file():
        return None
    kind = PretrainRecipe if source.startswith(_UNTRAINED) else EncoderRecipe
    return run_folder.read_recipe(_folder(source), kind)


def _open(name: str, source: str, recipe: EncoderRecipe | None) -> NamedEncoder:
    if recipe is None:
        raise UserError(
            f"{source} has no recipe.yaml beside it, and no other encoder has one. Give the recipe "
            "with --recipe, such as --recipe pretrain_vit_b_k400."
        )
    if source.startswith(_UNTRAINED):
        encoder = untrained(run_folder.read_recipe(_folder(source), PretrainRecipe)).encoder
    else:
        encoder = build_encoder(recipe.encoder)
        print(load_encoder(encoder, source, patch=recipe.patch), file=sys.stderr)
    return NamedEncoder(name, source, recipe, encoder)


def _names(sources: Sequence[str]) -> list[str]:
    """The last part of each path, or the whole source where two would have the same name."""
    for source, times in Counter(sources).items():
        if times > 1:
            raise UserError(f"{source} is given {times} times; give each encoder once.")
    names = [
        "untrained " * source.startswith(_UNTRAINED) + _folder(source).resolve().name
        for source in sources
    ]
    pairs = zip(names, sources, strict=True)
    return [name if names.count(name) == 1 else source for name, source in pairs]


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
        title = f"attention of {named.name}"
        spectra, skipped = measured_spectra(named.encoder, clips, device, cache, name=title)
        measured[named.name] = spectra
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
    measures: dict[str, Callable[[Tensor], Tensor]] = {
        f"rank (singular values > {threshold:g} x largest)": partial(rank, threshold=threshold)
        for threshold in thresholds
    }
    measures["effective rank"] = effective_rank
    panels = {
        title: {name: statistics(compute(spectra)) for name, spectra in measured.items()}
        for title, compute in measures.items()
    }
    document = {
        "shards": clips.shards.name,
        "manifest": clips.shards.hash,
        "clips": {name: len(spectra) for name, spectra in measured.items()},
        "tokens": tokens,
        "thresholds": list(thresholds),
        "encoders": {named.name: named.source for named in encoders},
        "measures": panels,
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
    depth = max(len(row["mean"]) for row in rows.values())
    layers = " | ".join(f"layer {number}" for number in range(1, depth + 1))
    lines = [f"| {title} | {layers} |", "|---" * (depth + 1) + "|"]
    for name, row in rows.items():
        figures = zip(row["mean"], row["deviation"], strict=True)
        cells = [f"{mean:.1f} ± {deviation:.1f}" for mean, deviation in figures]
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
            mean, deviation = np.array(row["mean"]), np.array(row["deviation"])
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
