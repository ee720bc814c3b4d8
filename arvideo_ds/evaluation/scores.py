"""Predictions of a model for every video once, over all ranks, averaged over its test views."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from arvideo_ds.config import Recipe
from arvideo_ds.data.clips import Skipped, for_labels
from arvideo_ds.data.loader import Batch, evaluation_batches, evaluation_loader
from arvideo_ds.engine.agreement import gather_objects
from arvideo_ds.shards.manifest import ShardSet, by_set

Key = TypeVar("Key")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Outputs:
    """All videos in the order of the shards: values V x K, labels V (-1 = none), valid V.

    Where the recipe has heads, labels are V x heads. Videos that did not decode have zeros, are not
    `valid`, and are listed in `skipped`.
    """

    values: Tensor
    labels: Tensor
    valid: Tensor
    skipped: list[Skipped]


@dataclass(frozen=True)
class Scores(Outputs):
    """`Outputs` whose values are class probabilities, V x classes."""

    @property
    def probabilities(self) -> Tensor:
        return self.values

    def _usable(self) -> tuple[Tensor, Tensor]:
        """Probabilities and labels of the readable, labelled videos."""
        usable = self.valid & (self.labels >= 0)
        return self.values[usable], self.labels[usable]

    def accuracy(self, top: int = 1) -> float:
        """Share of the readable, labelled videos whose label is among the `top` best classes."""
        probabilities, labels = self._usable()
        best = probabilities.topk(min(top, probabilities.shape[1]), dim=1).indices
        return _share((best == labels[:, None]).any(dim=1))

    def loss(self) -> float:
        """Mean negative logarithm of the label's probability."""
        probabilities, labels = self._usable()
        right = probabilities.gather(1, labels[:, None])
        return float(-right.clamp(min=1e-12).log().mean()) if len(right) else math.nan

    def confusion(self) -> Tensor:
        """Counts classes x classes; rows are labels, columns predictions."""
        probabilities, labels = self._usable()
        classes = probabilities.shape[1]
        pairs = labels * classes + probabilities.argmax(1)
        return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


@dataclass(frozen=True)
class JointScores(Outputs):
    """`Scores` of the same videos in several label sets: `sets` by name; labels are V x sets.

    A combination of classes scores the product of their probabilities; views are averaged before.
    Source: EPIC-KITCHENS-100 (arXiv 2006.13256): an action is a verb and a noun.
    """

    sets: dict[str, Scores]

    def accuracy(self, top: int = 1) -> float:
        """Share of the readable, labelled videos whose labels are a `top` best combination."""
        usable = self.valid & (self.labels >= 0).all(dim=1)
        probabilities = [scores.probabilities[usable] for scores in self.sets.values()]
        _, best = best_combinations(probabilities, top)
        return _share((best == self.labels[usable, None]).all(dim=2).any(dim=1))

    def loss(self) -> float:
        """Sum of the sets' losses: negative logarithm of the labels' joint probability."""
        return sum(scores.loss() for scores in self.sets.values())


AnyScores = Scores | JointScores


def _share(hits: Tensor) -> float:
    return float(hits.double().mean()) if len(hits) else math.nan


def best_combinations(probabilities: Sequence[Tensor], top: int) -> tuple[Tensor, Tensor]:
    """The `top` combinations of classes by the product of their probabilities, best first.

    probabilities: V x classes of each set. Returns the products V x m and the classes V x m x sets;
    m is `top`, or all combinations where there are fewer.
    """
    scores, classes = probabilities[0].new_ones(len(probabilities[0]), 1), list[Tensor]()
    for of_set in probabilities:
        # Only the best classes of each set can be in the best combinations.
        best = of_set.topk(min(top, of_set.shape[1]), dim=1)
        products = (scores[:, :, None] * best.values[:, None]).flatten(1)
        scores, places = products.topk(min(top, products.shape[1]), dim=1)
        before, last = places // best.indices.shape[1], places % best.indices.shape[1]
        classes = [part.gather(1, before) for part in classes] + [best.indices.gather(1, last)]
    return scores, torch.stack(classes, dim=2)


def score_videos(
    predict: Callable[[Batch], Tensor],
    shards: ShardSet,
    recipe: Recipe,
    **options: Any,
) -> AnyScores:
    """Score all videos; views are averaged after the softmax. Collective.

    predict: logits (clips x classes) of a batch; where the recipe has heads, those of all label
    sets, concatenated. options: as of `outputs_of`.
    """
    names = None if recipe.heads is None else by_set(shards.manifest.class_names(recipe.heads))
    counts = None if names is None else [len(classes) for classes in names.values()]

    def probabilities(loaded: Batch) -> Tensor:
        logits = predict(loaded).float()
        by_head = logits.split(counts or logits.shape[1], dim=1)
        return torch.cat([of_set.softmax(dim=1) for of_set in by_head], dim=1)

    outputs = outputs_of(probabilities, shards, recipe, **options)
    if names is None or counts is None:
        return Scores(**vars(outputs))
    parts = zip(names, outputs.values.split(counts, dim=1), outputs.labels.unbind(1), strict=True)
    sets = {
        # A copy: safetensors refuses tensors that share memory.
        name: Scores(values.clone(), labels, outputs.valid, outputs.skipped)
        for name, values, labels in parts
    }
    return JointScores(**vars(outputs), sets=sets)


def score_heads(
    predict: Callable[[Batch], Tensor],
    shards: ShardSet,
    recipe: Recipe,
    heads: int,
    **options: Any,
) -> dict[str, Any]:
    """Lists of `top1`, `top5` (shares) and `loss` of several heads of one label, and the numbers of
    `videos` and of `unreadable` ones. Collective.

    predict: logits (clips x (heads classes)) of a batch, equal for all views of a video. options:
    as of `outputs_of`. Unlike `score_videos`, keeps three numbers per video and head.
    """

    def figures(batch: Batch) -> Tensor:
        logits = predict(batch).float().unflatten(1, (heads, -1))
        labels = batch.labels.clamp(min=0)[:, None].expand(-1, heads)
        hits = logits.topk(min(5, logits.shape[2]), dim=2).indices == labels[..., None]
        losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        return torch.cat([hits[..., 0], hits.any(dim=2), losses], dim=1)

    outputs = outputs_of(figures, shards, recipe, **options)
    usable = outputs.valid & (outputs.labels >= 0)
    means = outputs.values[usable].double().mean(0).unflatten(0, (3, heads)).tolist()
    return {
        **dict(zip(("top1", "top5", "loss"), means, strict=True)),
        "videos": len(outputs.labels),
        "unreadable": len(outputs.skipped),
    }


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
    """Compute values for all videos, or for the first `videos`, as `over_ranks`. Collective.

    compute: values (clips x K) of a batch, averaged over the views of a video. batch: clips.
    """
    num_views = math.prod(views)
    count = min(shards.num_samples, shards.num_samples if videos is None else videos)

    def rows(loaded: Batch) -> Mapping[int, Any]:
        values = compute(loaded.to(device)).float().unflatten(0, (-1, num_views)).mean(1).cpu()
        keys, labels, valid = (
            column[::num_views].tolist() for column in (loaded.keys, loaded.labels, loaded.valid)
        )
        values[~loaded.valid[::num_views]] = 0
        return dict(zip(keys, zip(values, labels, valid, strict=True), strict=True))

    sampled = for_labels(shards, recipe)
    load = partial(evaluation_loader, shards, sampled, views=views, num_workers=num_workers)
    batches = evaluation_batches(count, max(1, batch // num_views))
    by_number, skipped = over_ranks(batches, load, rows, progress=progress)
    if sorted(by_number) != list(range(count)):
        raise AssertionError(f"{len(by_number)} of {count} videos were scored")
    values, labels, valid = zip(*(by_number[n] for n in range(count)), strict=True)
    return Outputs(torch.stack(values), torch.tensor(labels), torch.tensor(valid), skipped)


def over_ranks(
    batches: list[list[int]],
    load: Callable[[list[list[int]]], Iterable[Any]],
    compute: Callable[[Any], Mapping[Key, Result]],
    *,
    progress: str | None,
) -> tuple[dict[Key, Result], list[Skipped]]:
    """Compute results for batches of sample numbers; every rank gets all of them. Collective.

    load: loader of one rank's batches. The batches are given, so no result depends on the number of
    ranks. All ranks compute equally often (ZeRO-3 gathers weights within): a rank with fewer
    batches repeats the first one and discards its results.
    """
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = batches[rank::size]
    padded = mine + [batches[0]] * (math.ceil(len(batches) / size) - len(mine))
    results: dict[Key, Result] = {}
    skipped: list[Skipped] = []
    hidden = progress is None or rank > 0
    for number, batch in enumerate(tqdm(load(padded), progress, unit="batch", disable=hidden)):
        computed = compute(batch)
        if number < len(mine):
            results |= computed
            skipped += batch.skipped
    share = (results, skipped)
    shares = gather_objects(share) if dist.is_initialized() else [share]
    merged = {key: result for part, _ in shares for key, result in part.items()}
    return merged, [video for _, part in shares for video in part]
