"""Probes of a frozen encoder (linear, nearest neighbours, attentive), and of a finished run.

B clips, N tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from arvideo_ds.config import PretrainRecipe
from arvideo_ds.data.augment import seeded
from arvideo_ds.data.clips import for_labels
from arvideo_ds.data.loader import evaluation_loader
from arvideo_ds.evaluation.features import Features, FrozenEncoder, freeze
from arvideo_ds.evaluation.pretrained import load_trained_encoder, untrained
from arvideo_ds.evaluation.probes import Probe, probe_names
from arvideo_ds.evaluation.scores import score_videos
from arvideo_ds.models.encoder import layer_norm
from arvideo_ds.shards.manifest import ShardSet

_CHUNK = 1024
_BATCH, _RATE, _DECAY = 32, 1e-3, 0.01


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


class AttentiveHead(nn.Module):
    """A learned query attends to the tokens; its answer is normalised and classified."""

    def __init__(self, width: int, heads: int, num_classes: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(1, 1, width))
        nn.init.trunc_normal_(self.query, std=0.02)
        self.tokens_norm, self.norm = layer_norm(width), layer_norm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.head = nn.Linear(width, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits B x classes of tokens B N D."""
        tokens = self.tokens_norm(tokens)
        query = self.query.expand(len(tokens), -1, -1)
        answer, _ = self.attention(query, tokens, tokens, need_weights=False)
        return self.head(self.norm(answer[:, 0]))


@dataclass(frozen=True)
class AttentiveProbe(Probe):
    """A learned query attends to all tokens; its answer is classified.

    It finds what a few tokens encode and their mean hides. Source: the attentive probe of V-JEPA
    (Bardes et al. 2024, arXiv 2404.08471), section 4. The head is trained on the central clips,
    which each epoch decodes and encodes again, so memory does not grow with the data. The recipe's
    seed draws the initial head and the order.
    """

    label = "attentive probe"
    epochs: int = 10

    def accuracy(self, frozen: FrozenEncoder) -> float:
        head = self._trained(frozen).eval()
        with torch.no_grad():
            scores = score_videos(
                lambda batch: head(frozen.tokens(batch).float()),
                frozen.test,
                frozen.recipe,
                views=(1, 1),
                batch=_BATCH,
                num_workers=frozen.num_workers,
                device=frozen.device,
            )
        return round(scores.accuracy(), 4)

    def _trained(self, frozen: FrozenEncoder) -> AttentiveHead:
        train, recipe = frozen.train, frozen.recipe
        num_classes = len(train.manifest.labels or ())
        with seeded(recipe.train.seed):
            head = AttentiveHead(recipe.size.width, recipe.size.heads, num_classes)
            head = head.to(frozen.device)
            order = torch.randperm(train.num_samples)
        batches = [batch.tolist() for batch in order.split(_BATCH)] * self.epochs
        optimizer = torch.optim.AdamW(head.parameters(), lr=_RATE, weight_decay=_DECAY)
        loader = evaluation_loader(
            train, for_labels(train, recipe), batches, num_workers=frozen.num_workers
        )
        shown = tqdm(loader, f"attentive probe on {train.name}", unit="batch", total=len(batches))
        for step, loaded in enumerate(shown):
            batch = loaded.to(frozen.device)
            usable = batch.valid & (batch.labels >= 0)
            for group in optimizer.param_groups:
                group["lr"] = _RATE * 0.5 * (1 + math.cos(math.pi * step / len(batches)))
            logits = head(frozen.tokens(batch).float())
            losses = F.cross_entropy(logits, batch.labels.clamp(min=0), reduction="none")
            optimizer.zero_grad()
            ((losses * usable).sum() / usable.sum().clamp(min=1)).backward()
            optimizer.step()
        return head


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
        "probe_videos": [len(features.values) for features in frozen.features],
        "probe_chance_accuracy": round(1 / len(train.manifest.labels or "?"), 4),
        "probe_features": recipe.probe.features,
        "probe_clips": recipe.probe.clips,
        "probe_manifests": [train.hash, test.hash],
    }


def in_words(results: Mapping[str, Any]) -> str:
    """The accuracy of each probe on a data set, and that of the untrained encoder."""
    cells = [
        f"{probe} {100 * results[f'{probe}_accuracy']:.1f} % "
        f"(untrained {100 * results[f'untrained_{probe}_accuracy']:.1f})"
        for probe in probe_names(results)
    ]
    train, test = results["probe_videos"]
    chance = 100 * results["probe_chance_accuracy"]
    videos = f"trained on {train:,} videos, tested on {test:,}"
    return f"{', '.join(cells)}; chance {chance:.1f} %; {videos}"
