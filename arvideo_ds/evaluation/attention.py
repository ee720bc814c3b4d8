"""Rank of the attention maps, layer by layer.

A map is softmax(q k' / sqrt(d)), one per head and clip, under full attention on the whole clip. Its
rank is at most its number of tokens; a head whose tokens all attend alike has rank 1.

rank: singular values above a threshold x the largest. Neither ARVideo, which plots the rank, nor
Linformer, which it follows, reports a threshold, and a softmax of real numbers nearly always has
full rank. So every rank is reported with its threshold, beside the effective rank, which has none.

B clips, L layers, h heads, N tokens, d width of a head, D of the encoder.
Source: ARVideo (arXiv 2405.15160), section 4.2 and Figure 3; Linformer (arXiv 2006.04768),
section 3; effective rank: Roy and Vetterli 2007, EUSIPCO.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from arvideo_ds.config import EncoderRecipe
from arvideo_ds.data.loader import evaluation_loader
from arvideo_ds.errors import UserError
from arvideo_ds.files.atomic import replacing
from arvideo_ds.geometry import Triple
from arvideo_ds.models.encoder import Encoder, encode_clips
from arvideo_ds.shards.manifest import ShardSet

# The settings of `data` that decide which pixels the encoders see.
_CLIP_SETTINGS = {"frames", "size", "stride", "sampling"}


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
    """exp of the entropy of the singular values (last axis) as shares of their sum: 1 to N.

    Source: Roy and Vetterli 2007, definition 1.
    """
    shares = spectra / spectra.sum(-1, keepdim=True)
    return torch.special.entr(shares).sum(-1).exp()


@dataclass(frozen=True)
class Statistics:
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
    """The central clips of the samples `numbers` of shards, cropped as one recipe says."""

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
            with replacing(files[int(batch.keys)]) as partial, partial.open("wb") as file:
                np.save(file, spectra[0].float().cpu().numpy())
    measured = [_load(file) for file in files.values() if file.exists()]
    if not measured:
        raise UserError(
            f"none of the {len(files)} clips of {clips.shards.name} decoded: "
            "`arvideo verify` says why."
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
    settings = clips.recipe.data.model_dump(mode="json", include=_CLIP_SETTINGS)
    heads = [attention.num_heads for attention in _attentions(encoder)]
    digest.update(json.dumps([settings, clips.recipe.patch, heads]).encode())
    # Positions are not in the state: they are recomputed from the recipe.
    for name, value in {**encoder.state_dict(), "positions": encoder.positions}.items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
