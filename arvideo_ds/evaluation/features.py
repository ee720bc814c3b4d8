"""Features of whole clips: the encoder under full attention, its tokens pooled to one vector."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import reduce
from torch import Tensor
from tqdm import tqdm

from arvideo_ds.config import PretrainRecipe
from arvideo_ds.data.clips import NO_LABEL, for_labels
from arvideo_ds.data.loader import evaluation_batches, evaluation_loader, worker_count
from arvideo_ds.errors import UserError
from arvideo_ds.host import available_cores
from arvideo_ds.models.encoder import Encoder, encode_clips
from arvideo_ds.shards.manifest import ShardSet

_BATCH = 64
_SPANS = 8


@dataclass(frozen=True)
class Features:
    """values: n D, float32. labels: n, int64. skipped: videos that did not decode, left out."""

    values: Tensor
    labels: Tensor
    skipped: int


@torch.no_grad()
def extract(
    encoder: Encoder,
    shards: ShardSet,
    recipe: PretrainRecipe,
    device: torch.device,
    *,
    videos: int | None = None,
) -> Features:
    """Features of every video: the mean over `probe.clips` clips, pooled as `probe.features` says.

    `videos` takes the first ones only (shards are shuffled when they are made). Frames are sampled
    as the labels of the shards need (data/clips.py, `for_labels`).

    Errors: `UserError` where the shards have no labels.
    """
    if shards.manifest.labels is None:
        raise UserError(f"{shards.name} has no labels; a probe needs class folders or a CSV.")
    encoder = encoder.to(device)
    workers = worker_count(recipe, cores=len(available_cores()))
    count = shards.num_samples if videos is None else min(videos, shards.num_samples)
    clips, sampled = recipe.probe.clips, for_labels(shards, recipe)
    batches = evaluation_batches(count, max(1, _BATCH // clips))
    loader = evaluation_loader(shards, sampled, batches, views=(clips, 1), num_workers=workers)
    values, labels, skipped = [], [], 0
    for batch in tqdm(loader, desc=f"features of {shards.name}", unit="batch"):
        moved = batch.to(device)
        tokens = encode_clips(encoder, moved.clips, recipe.patch)
        pooled = POOLING[recipe.probe.features].pool(tokens, recipe.geometry.grid[0])
        pooled = pooled.float().unflatten(0, (-1, clips)).mean(1)
        labels_of_videos = moved.labels[::clips]
        usable = moved.valid[::clips] & (labels_of_videos != NO_LABEL)
        values.append(pooled[usable].cpu())
        labels.append(labels_of_videos[usable].cpu())
        skipped += batch.num_skipped
    return Features(torch.cat(values), torch.cat(labels), skipped)


def mean(tokens: Tensor, _times: int) -> Tensor:
    """Tokens B (t s) D -> their mean, B D: what the published protocols classify."""
    return tokens.mean(1)


def change(tokens: Tensor, times: int) -> Tensor:
    """Tokens B (t s) D -> mean of the later half of the times less that of the earlier, B D.

    What stands still (scene, colours) is the same in both halves and drops out; what moves stays.
    With an odd number of times the middle one is in neither half.
    """
    by_time = reduce(tokens, "b (t s) d -> b t d", "mean", t=times)
    half = times // 2
    return by_time[:, -half:].mean(1) - by_time[:, :half].mean(1)


def course(tokens: Tensor, times: int) -> Tensor:
    """Tokens B (t s) D -> means of up to 8 spans of time less that of all, side by side, B (8 D).

    Where `change` knows earlier from later, this knows when, and in what order.
    """
    by_time = reduce(tokens, "b (t s) d -> b t d", "mean", t=times)
    spans = [span.mean(1) for span in by_time.tensor_split(min(_SPANS, times), dim=1)]
    return torch.cat([span - by_time.mean(1) for span in spans], dim=1)


@dataclass(frozen=True)
class Pooling:
    """pool: tokens B (t s) D and t -> B D'. words: what that is, for people."""

    pool: Callable[[Tensor, int], Tensor]
    words: str


POOLING = {
    "mean": Pooling(mean, "mean of the tokens"),
    "change": Pooling(
        change, "mean of the tokens of the later times less that of the earlier times"
    ),
    "course": Pooling(
        course, f"means of the tokens of {_SPANS} spans of time, each less the mean of all tokens,"
    ),
}
