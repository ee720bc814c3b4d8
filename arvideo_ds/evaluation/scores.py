"""Every video once, over all ranks: what a model says of it, averaged over its test views."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from arvideo_ds.config import Recipe
from arvideo_ds.data.clips import Skipped
from arvideo_ds.data.loader import Batch, evaluation_batches, evaluation_loader
from arvideo_ds.data.manifest import ShardSet


@dataclass(frozen=True)
class Outputs:
    """Of all videos, in the order of the shards: values V x K, labels V (-1 = none), valid V.

    Videos that did not decode have zeros, are not `valid`, and stand in `skipped`.
    """

    values: Tensor
    labels: Tensor
    valid: Tensor
    skipped: list[Skipped]


@dataclass(frozen=True)
class Scores:
    """`Outputs` that are class probabilities, V x classes."""

    probabilities: Tensor
    labels: Tensor
    valid: Tensor
    skipped: list[Skipped]

    def accuracy(self, top: int = 1) -> float:
        """Share of the readable, labelled videos whose label is among the `top` best classes."""
        usable = self.valid & (self.labels >= 0)
        best = self.probabilities[usable].topk(min(top, self.probabilities.shape[1]), dim=1).indices
        hits = (best == self.labels[usable, None]).any(dim=1)
        return float(hits.double().mean()) if len(hits) else math.nan

    def loss(self) -> float:
        """Mean negative logarithm of the label's probability."""
        usable = self.valid & (self.labels >= 0)
        right = self.probabilities[usable].gather(1, self.labels[usable, None])
        return float(-right.clamp(min=1e-12).log().mean()) if len(right) else math.nan

    def confusion(self) -> Tensor:
        """Counts classes x classes; rows are labels, columns predictions."""
        usable = self.valid & (self.labels >= 0)
        classes = self.probabilities.shape[1]
        pairs = self.labels[usable] * classes + self.probabilities[usable].argmax(1)
        return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def score_videos(
    predict: Callable[[Batch], Tensor],
    shards: ShardSet,
    recipe: Recipe,
    *,
    views: tuple[int, int],
    batch: int,
    num_workers: int,
    device: torch.device,
    progress: str | None = None,
) -> Scores:
    """Score all videos as `outputs_of`; views are averaged after the softmax. Collective.

    predict: logits (clips x classes) of a batch.
    """
    found = outputs_of(
        lambda loaded: predict(loaded).float().softmax(dim=1),
        shards,
        recipe,
        views=views,
        batch=batch,
        num_workers=num_workers,
        device=device,
        progress=progress,
    )
    return Scores(found.values, found.labels, found.valid, found.skipped)


def outputs_of(
    compute: Callable[[Batch], Tensor],
    shards: ShardSet,
    recipe: Recipe,
    *,
    views: tuple[int, int],
    batch: int,
    num_workers: int,
    device: torch.device,
    progress: str | None = None,
) -> Outputs:
    """Compute something of all videos; every rank calls it and gets the whole. Collective.

    compute: values (clips x K) of a batch, averaged over the views of a video. Batches are cut
    before they are dealt to ranks, so a video's values do not depend on their number, and all ranks
    compute equally often (ZeRO-3 gathers weights within).
    """
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    num_views = math.prod(views)
    batches = evaluation_batches(shards.num_samples, max(1, batch // num_views))
    mine = batches[rank::size]
    # A rank whose share is shorter predicts the first batch once more, and forgets it.
    dealt = mine + [batches[0]] * (math.ceil(len(batches) / size) - len(mine))
    loader = evaluation_loader(shards, recipe, dealt, views=views, num_workers=num_workers)
    rows: dict[int, tuple[Tensor, int, bool]] = {}
    skipped: list[Skipped] = []
    shown = tqdm(loader, desc=progress, unit="batch", disable=progress is None or rank > 0)
    for number, loaded in enumerate(shown):
        moved = loaded.to(device)
        values = compute(moved).float().unflatten(0, (-1, num_views))
        if number < len(mine):
            rows.update(_rows(loaded, values.mean(1).cpu(), num_views))
            skipped += loaded.skipped
    return _together(rows, skipped, shards.num_samples)


def _rows(
    batch: Batch, means: Tensor, views: int
) -> Iterator[tuple[int, tuple[Tensor, int, bool]]]:
    """Of each video of a batch its number, values, label, and whether it decoded."""
    keys, labels = batch.keys[::views].tolist(), batch.labels[::views].tolist()
    for number, mean, label, valid in zip(
        keys, means, labels, batch.valid[::views].tolist(), strict=True
    ):
        yield number, (mean if valid else torch.zeros_like(mean), label, valid)


def _together(
    rows: dict[int, tuple[Tensor, int, bool]], skipped: list[Skipped], num_samples: int
) -> Outputs:
    shares: list[Any] = [(rows, skipped)]
    if dist.is_initialized():
        shares = [None] * dist.get_world_size()
        dist.all_gather_object(shares, (rows, skipped))
    merged = {number: row for share, _ in shares for number, row in share.items()}
    if sorted(merged) != list(range(num_samples)):
        raise AssertionError(f"{len(merged)} of {num_samples} videos were seen")
    values, labels, valid = zip(*(merged[n] for n in range(num_samples)), strict=True)
    return Outputs(
        torch.stack(values),
        torch.tensor(labels),
        torch.tensor(valid),
        [video for _, share in shares for video in share],
    )
