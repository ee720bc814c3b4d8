"""Every video once, over all ranks: what a model says of it, averaged over its test views."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from arvideo_ds.config import Recipe
from arvideo_ds.data.clips import Skipped, for_labels
from arvideo_ds.data.loader import Batch, evaluation_batches, evaluation_loader
from arvideo_ds.shards.manifest import ShardSet, by_set

# Of a video: its values, its label (of each head), whether it decoded.
Row = tuple[Tensor, int | list[int], bool]


@dataclass(frozen=True)
class Outputs:
    """Of all videos, in the order of the shards: values V x K, labels V (-1 = none), valid V.

    Where the recipe has heads, labels are V x heads. Videos that did not decode have zeros, are not
    `valid`, and are listed in `skipped`.
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


@dataclass(frozen=True)
class JointScores:
    """`Scores` of the same videos in each of several label sets, by the set's name.

    A combination of classes, one of each set, scores the product of their probabilities. Views are
    averaged in each set before. Source: EPIC-KITCHENS-100 (arXiv 2006.13256), action recognition:
    an action's score is that of its verb times that of its noun.
    """

    sets: dict[str, Scores]

    @property
    def labels(self) -> Tensor:
        """V x sets; -1 = none."""
        return torch.stack([scores.labels for scores in self.sets.values()], dim=1)

    @property
    def valid(self) -> Tensor:
        return next(iter(self.sets.values())).valid

    @property
    def skipped(self) -> list[Skipped]:
        return next(iter(self.sets.values())).skipped

    def accuracy(self, top: int = 1) -> float:
        """Share of the readable videos with all labels that stand among the `top` best together."""
        labels = self.labels
        usable = self.valid & (labels >= 0).all(dim=1)
        probabilities = [scores.probabilities[usable] for scores in self.sets.values()]
        _, best = best_combinations(probabilities, top)
        hits = (best == labels[usable, None]).all(dim=2).any(dim=1)
        return float(hits.double().mean()) if len(hits) else math.nan

    def loss(self) -> float:
        """Sum of the sets' losses: negative logarithm of the labels' joint probability."""
        return sum(scores.loss() for scores in self.sets.values())


def best_combinations(probabilities: Sequence[Tensor], top: int) -> tuple[Tensor, Tensor]:
    """The `top` combinations of classes by the product of their probabilities, best first.

    probabilities: V x classes of each set. Returns the products V x m and the classes V x m x sets;
    m is `top`, or all combinations where there are fewer.
    """
    scores, classes = probabilities[0].new_ones(len(probabilities[0]), 1), list[Tensor]()
    for own in probabilities:
        # No better one is lost: the best combinations consist of what is best in each set.
        best = own.topk(min(top, own.shape[1]), dim=1)
        products = (scores[:, :, None] * best.values[:, None]).flatten(1)
        scores, places = products.topk(min(top, products.shape[1]), dim=1)
        before, last = places // best.indices.shape[1], places % best.indices.shape[1]
        classes = [part.gather(1, before) for part in classes] + [best.indices.gather(1, last)]
    return scores, torch.stack(classes, dim=2)


AnyScores = Scores | JointScores


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
) -> AnyScores:
    """Score all videos as `outputs_of`; views are averaged after the softmax. Collective.

    predict: logits (clips x classes) of a batch; where the recipe has heads, those of one label set
    after another.
    """
    names = None if recipe.heads is None else by_set(shards.manifest.class_names(recipe.heads))
    counts = None if names is None else [len(classes) for classes in names.values()]
    found = outputs_of(
        lambda loaded: _probabilities(predict(loaded).float(), counts),
        shards,
        recipe,
        views=views,
        batch=batch,
        num_workers=num_workers,
        device=device,
        progress=progress,
    )
    if names is None or counts is None:
        return Scores(found.values, found.labels, found.valid, found.skipped)
    rest = found.valid, found.skipped
    parts = zip(found.values.split(counts, dim=1), found.labels.unbind(1), strict=True)
    sets = [
        Scores(values.clone(memory_format=torch.contiguous_format), labels, *rest)
        for values, labels in parts
    ]
    return JointScores(dict(zip(names, sets, strict=True)))


def _probabilities(logits: Tensor, counts: list[int] | None) -> Tensor:
    if counts is None:
        return logits.softmax(dim=1)
    return torch.cat([own.softmax(dim=1) for own in logits.split(counts, dim=1)], dim=1)


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
    videos: int | None = None,
) -> Outputs:
    """Compute something of all videos, or of the first `videos`; every rank gets the whole.
    Collective.

    compute: values (clips x K) of a batch, averaged over the views of a video. Batches are cut
    before they are assigned to ranks, so a video's values do not depend on the number of ranks, and
    all ranks compute equally often (ZeRO-3 gathers weights within).
    """
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    num_views = math.prod(views)
    count = min(shards.num_samples, shards.num_samples if videos is None else videos)
    batches = evaluation_batches(count, max(1, batch // num_views))
    mine = batches[rank::size]
    # A rank whose share is shorter predicts the first batch once more, and forgets it.
    dealt = mine + [batches[0]] * (math.ceil(len(batches) / size) - len(mine))
    sampled = for_labels(shards, recipe)
    loader = evaluation_loader(shards, sampled, dealt, views=views, num_workers=num_workers)
    rows: dict[int, Row] = {}
    skipped: list[Skipped] = []
    shown = tqdm(loader, desc=progress, unit="batch", disable=progress is None or rank > 0)
    for number, loaded in enumerate(shown):
        moved = loaded.to(device)
        values = compute(moved).float().unflatten(0, (-1, num_views))
        if number < len(mine):
            rows.update(_rows(loaded, values.mean(1).cpu(), num_views))
            skipped += loaded.skipped
    return _together(rows, skipped, count)


def _rows(batch: Batch, means: Tensor, views: int) -> Iterator[tuple[int, Row]]:
    """Of each video of a batch its number, values, label, and whether it decoded."""
    keys, labels = batch.keys[::views].tolist(), batch.labels[::views].tolist()
    for number, mean, label, valid in zip(
        keys, means, labels, batch.valid[::views].tolist(), strict=True
    ):
        yield number, (mean if valid else torch.zeros_like(mean), label, valid)


def _together(rows: dict[int, Row], skipped: list[Skipped], num_samples: int) -> Outputs:
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
