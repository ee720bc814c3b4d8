"""Probes of pooled features (logistic regression, nearest neighbours), and of finished runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arvideo_ds.config import PretrainRecipe
from arvideo_ds.evaluation.features import Features, FrozenEncoder, freeze
from arvideo_ds.evaluation.pretrained import load_trained_encoder, untrained
from arvideo_ds.evaluation.probes import Probe, probe_names
from arvideo_ds.shards.manifest import ShardSet

_CHUNK = 1024


class LinearProbe(Probe):
    """Logistic regression on the standardised features."""

    label = "linear probe"

    def accuracy(self, frozen: FrozenEncoder) -> float:
        return linear_probe(*frozen.features)


class NearestNeighbours(Probe):
    """Vote of the 20 nearest training videos, by cosine of the centred features."""

    label = "nearest neighbours"

    def accuracy(self, frozen: FrozenEncoder) -> float:
        return nearest_neighbours(*frozen.features)


def linear_probe(train: Features, test: Features, *, weight_decay: float = 1e-3) -> float:
    """Test accuracy of multinomial logistic regression on standardised features.

    Convex and fitted to convergence (L-BFGS), so the result depends on no learning rate or seed.
    """
    mean, std = train.values.mean(0), train.values.std(0) + 1e-6
    inputs, queries = (train.values - mean) / std, (test.values - mean) / std
    num_classes = int(max(train.labels.max(), test.labels.max())) + 1
    head = nn.Linear(inputs.shape[1], num_classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(
        head.parameters(), max_iter=500, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        penalty = 0.5 * weight_decay * head.weight.square().sum()
        loss = F.cross_entropy(head(inputs), train.labels) + penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return _accuracy(head(queries).argmax(1), test.labels)


def nearest_neighbours(train: Features, test: Features, *, neighbours: int = 20) -> float:
    """Test accuracy of a vote of the nearest training clips by cosine of centred features."""
    mean = train.values.mean(0)
    bank = F.normalize(train.values - mean, dim=1)
    num_classes = int(train.labels.max()) + 1
    votes = F.one_hot(train.labels, num_classes).float()
    predicted = []
    for queries in (test.values - mean).split(_CHUNK):
        similarity = F.normalize(queries, dim=1) @ bank.T
        nearest = similarity.topk(min(neighbours, len(bank)), dim=1)
        weight = (nearest.values / 0.07).softmax(dim=1)
        predicted.append((votes[nearest.indices] * weight[..., None]).sum(1).argmax(1))
    return _accuracy(torch.cat(predicted), test.labels)


def _accuracy(predicted: Tensor, labels: Tensor) -> float:
    return round(float((predicted == labels).float().mean()), 4)


def probe_run(
    run: Path, recipe: PretrainRecipe, train: ShardSet, test: ShardSet, probes: Mapping[str, Probe]
) -> dict[str, Any]:
    """Results for summary.json: NAME_accuracy and untrained_NAME_accuracy of each probe, and the
    settings and data that decide them."""
    results: dict[str, Any] = {}
    for prefix, encoder in (
        ("", load_trained_encoder(recipe, run)),
        ("untrained_", untrained(recipe).encoder),
    ):
        frozen = freeze(encoder, recipe, train, test)
        for name, probe in probes.items():
            results[f"{prefix}{name}_accuracy"] = probe.accuracy(frozen)
        results["probe_clips_skipped"] = sum(features.skipped for features in frozen.features)
    return results | {
        "probe_chance_accuracy": round(1 / len(train.manifest.labels or "?"), 4),
        "probe_features": recipe.probe.features,
        "probe_clips": recipe.probe.clips,
        "probe_manifests": [train.hash, test.hash],
    }


def side_by_side(sets: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line per data set: the accuracy of each probe (that of the untrained encoder)."""
    lines = []
    for name, results in sets.items():
        cells = [
            f"{probe} {100 * results[f'{probe}_accuracy']:.1f} "
            f"({100 * results[f'untrained_{probe}_accuracy']:.1f})"
            for probe in probe_names(results)
        ]
        lines.append(f"{name}: {', '.join(cells)}; percent, untrained in brackets")
    return lines
