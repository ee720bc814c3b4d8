"""Attentive probe: one cross-attention layer reads the frozen encoder's tokens, then a linear head.

Where the mean of the tokens hides what a few of them know, this finds it. Source: the attentive
probe of V-JEPA (Bardes et al. 2024, arXiv 2404.08471), section 4.

B clips, N tokens, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from arvideo_ds.config import Recipe
from arvideo_ds.data.augment import seeded
from arvideo_ds.data.clips import for_labels
from arvideo_ds.data.loader import Batch, evaluation_batches, evaluation_loader
from arvideo_ds.evaluation.scores import score_videos
from arvideo_ds.models.encoder import Encoder, encode_clips, layer_norm
from arvideo_ds.shards.manifest import ShardSet

_BATCH, _RATE, _DECAY = 32, 1e-3, 0.01


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


def attentive_probe(
    encoder: Encoder,
    train: ShardSet,
    test: ShardSet,
    recipe: Recipe,
    device: torch.device,
    *,
    epochs: int,
    num_workers: int,
) -> float:
    """Test accuracy of a head trained on the central clips, one pass of decoding per epoch.

    Tokens are computed anew in every epoch, so memory does not grow with the data. The seed of the
    recipe draws the head and the order.
    """
    encoder = encoder.to(device).eval().requires_grad_(False)
    num_classes = len(train.manifest.labels or ())
    with seeded(recipe.train.seed):
        head = AttentiveHead(recipe.size.width, recipe.size.heads, num_classes).to(device)
        order = torch.randperm(train.num_samples)
        batches = [order[numbers].tolist() for numbers in _numbers(train)] * epochs
    optimizer = torch.optim.AdamW(head.parameters(), lr=_RATE, weight_decay=_DECAY)
    sampled = for_labels(train, recipe)
    loader = evaluation_loader(train, sampled, batches, num_workers=num_workers)
    shown = tqdm(loader, desc=f"attentive probe on {train.name}", unit="batch", total=len(batches))
    for step, loaded in enumerate(shown):
        batch = loaded.to(device)
        usable = batch.valid & (batch.labels >= 0)
        for group in optimizer.param_groups:
            group["lr"] = _RATE * 0.5 * (1 + math.cos(math.pi * step / len(batches)))
        logits = head(_tokens(encoder, batch, recipe))
        losses = F.cross_entropy(logits, batch.labels.clamp(min=0), reduction="none")
        optimizer.zero_grad()
        ((losses * usable).sum() / usable.sum().clamp(min=1)).backward()
        optimizer.step()
    head.eval()
    with torch.no_grad():
        scores = score_videos(
            lambda batch: head(_tokens(encoder, batch, recipe)),
            test,
            recipe,
            views=(1, 1),
            batch=_BATCH,
            num_workers=num_workers,
            device=device,
        )
    return round(scores.accuracy(), 4)


def _numbers(shards: ShardSet) -> list[list[int]]:
    return evaluation_batches(shards.num_samples, _BATCH)


@torch.no_grad()
def _tokens(encoder: Encoder, batch: Batch, recipe: Recipe) -> Tensor:
    return encode_clips(encoder, batch.clips, recipe.patch).float()
