"""Attentive probe: a cross-attention layer over the frozen encoder's tokens, then a linear head.

It finds what a few tokens encode and their mean hides. Source: the attentive probe of V-JEPA
(Bardes et al. 2024, arXiv 2404.08471), section 4.

B clips, N tokens, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from arvideo_ds.data.augment import seeded
from arvideo_ds.data.clips import for_labels
from arvideo_ds.data.loader import evaluation_loader
from arvideo_ds.evaluation.features import FrozenEncoder
from arvideo_ds.evaluation.probes import Probe
from arvideo_ds.evaluation.scores import score_videos
from arvideo_ds.models.encoder import layer_norm

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


@dataclass(frozen=True)
class AttentiveProbe(Probe):
    """A learned query attends to all tokens; its answer is classified.

    The head is trained on the central clips. Each epoch decodes and encodes them again, so memory
    does not grow with the data. The recipe's seed draws the initial head and the order.
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
