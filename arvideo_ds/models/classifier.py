"""A video classifier: the pretrained encoder, pooling, one linear layer.

B clips, T H W frames and pixels, N tokens (M of them seen), D width. Views of a video are
consecutive clips, temporal x spatial; the tokens of its temporal ones are pooled together.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from einops import rearrange, repeat
from timm.layers import AttentionPoolLatent, Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from arvideo_ds.config.sizes import PROBE_MLP_RATIO, EncoderSpec
from arvideo_ds.models.encoder import (
    build_encoder,
    encode_clips,
    initialize,
    layer_norm,
    linear_head,
)


class Classifier(nn.Module):
    """The model of fine-tuning on labels.

    pooling: mean = the mean of the tokens, LayerNorm, linear layer, without the encoder's norm
    (VideoMAE, modeling_finetune.py); motion = the same with the mean of `changes`; attention = the
    encoder's norm, one class-attention layer, linear layer (LVMAE's ViT-L; timm's "map" pooling);
    attentive = the encoder's norm, `AttentivePooling` of so many blocks, linear layer.
    head_dropout: probability that a feature is zeroed before the linear layer in training, drawn
    from torch's generator as `drop_path` is.
    num_classes: of all label sets; the linear layer has their classes one set after another.
    """

    def __init__(
        self,
        encoder: EncoderSpec,
        num_classes: int,
        *,
        pooling: str = "mean",
        pooling_depth: int = 1,
        drop_path: float = 0.0,
        head_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        size, attends = encoder.size, pooling not in ("mean", "motion")
        self.patch = encoder.geometry.patch
        self.encoder = build_encoder(encoder, drop_path=drop_path, final_norm=attends)
        self.norm = nn.Identity() if attends else layer_norm(size.width)
        self.times = encoder.geometry.grid[0] if pooling == "motion" else None
        self.class_attention: nn.Module | None = None
        if pooling == "attentive":
            self.class_attention = AttentivePooling(size.width, size.heads, pooling_depth)
        elif attends:
            ratio = size.mlp / size.width
            self.class_attention = AttentionPoolLatent(
                size.width, num_heads=size.heads, mlp_ratio=ratio, norm_layer=layer_norm
            )
            initialize(self.class_attention)
        self.dropout = nn.Dropout(head_dropout)
        head = nn.Linear if pooling == "attentive" else linear_head
        self.head = head(size.width, num_classes)

    def forward(
        self, clips: Tensor, tokens: Tensor | None = None, *, views: tuple[int, int] = (1, 1)
    ) -> Tensor:
        """Logits B x classes of clips B T H W 3, uint8 or floating 0..1.

        tokens: B M, the only ones that are encoded; None = all. Clips that are pooled together have
        the same logits.
        """
        encoded = encode_clips(self.encoder, clips, self.patch, tokens)
        pooled = self.pool(pooled_together(encoded, views), clips=views[0])
        return of_each_clip(self.classify(pooled), views)

    def pool(self, tokens: Tensor, clips: int = 1) -> Tensor:
        """Encoded tokens B M D of one or more clips each to one vector each, B D."""
        if self.class_attention is not None:
            return self.class_attention(tokens)
        if self.times is not None:
            tokens = changes(tokens, self.times, clips)
        return tokens.mean(1)

    def classify(self, features: Tensor) -> Tensor:
        """Logits B x classes of pooled tokens B D."""
        return self.head(self.dropout(self.norm(features)))


class AttentivePooling(nn.Module):
    """Blocks of self-attention over all tokens, then one in which a learned query attends to them.

    depth: number of blocks with the query's. Initialised from torch's generator. Source: the
    attentive probe of V-JEPA (arXiv 2404.08471; depth 1) and V-JEPA 2 (arXiv 2506.09985; depth 4,
    src/models/attentive_pooler.py): the query's attention has no output projection.
    """

    def __init__(self, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.heads = heads
        self.blocks = nn.ModuleList(
            Block(width, heads, PROBE_MLP_RATIO, qkv_bias=True, norm_layer=nn.LayerNorm)
            for _ in range(depth - 1)
        )
        self.query = nn.Parameter(torch.empty(1, 1, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.mlp = Mlp(width, PROBE_MLP_RATIO * width)
        self._initialize()

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens B N D to one vector each, B D."""
        for block in self.blocks:
            tokens = block(tokens)
        query = self.query.expand(tokens.shape[0], -1, -1)  # an export traces no len
        q = rearrange(self.q(query), "b n (h d) -> b h n d", h=self.heads)
        kv = self.kv(self.norm1(tokens))
        k, v = rearrange(kv, "b n (two h d) -> two b h n d", two=2, h=self.heads)
        answer = F.scaled_dot_product_attention(q, k, v)
        query = query + rearrange(answer, "b h n d -> b n (h d)")
        return (query + self.mlp(self.norm2(query)))[:, 0]

    def _initialize(self) -> None:
        """Normal weights; the last layer of a branch is divided by sqrt(2 x its block's number)."""
        nn.init.trunc_normal_(self.query, std=0.02)
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
                nn.init.zeros_(part.bias)
        blocks: Any = self.blocks
        for number, block in enumerate(blocks, start=1):
            _divide(block.attn.proj, math.sqrt(2 * number))
            _divide(block.mlp.fc2, math.sqrt(2 * number))
        # The query's block has the number of the one before it.
        _divide(self.mlp.fc2, math.sqrt(2 * max(1, len(self.blocks))))


class HeadGrid(nn.Module):
    """A frozen encoder under several attentive heads, each as that of `Classifier`.

    The heads start from the same weights, those of a `Classifier` from the same seed.
    """

    def __init__(self, encoder: EncoderSpec, num_classes: int, *, count: int, depth: int) -> None:
        super().__init__()
        size = encoder.size
        self.patch = encoder.geometry.patch
        self.encoder = build_encoder(encoder)
        pooling = AttentivePooling(size.width, size.heads, depth)
        # Names as in `Classifier`: `only_head` makes one of them.
        head = nn.ModuleDict(
            {"class_attention": pooling, "head": nn.Linear(size.width, num_classes)}
        )
        self.heads = nn.ModuleList(copy.deepcopy(head) for _ in range(count))

    def forward(
        self, clips: Tensor, tokens: Tensor | None = None, *, views: tuple[int, int] = (1, 1)
    ) -> Tensor:
        """Logits B x (heads classes); arguments as of `Classifier`. Encodes once."""
        encoded = pooled_together(encode_clips(self.encoder, clips, self.patch, tokens), views)
        heads: Any = self.heads
        logits = [head["head"](head["class_attention"](encoded)) for head in heads]
        return of_each_clip(torch.cat(logits, dim=1), views)


def changes(tokens: Tensor, times: int, clips: int = 1) -> Tensor:
    """How much every token changes from one time to the next: absolute differences.

    Tokens B (c t s) D of so many clips, each of so many times -> B (c (t-1) s) D. What does not
    move (scene, colours) cancels.
    """
    by_time = rearrange(tokens, "b (c t s) d -> b c t s d", c=clips, t=times)
    return rearrange(by_time.diff(dim=2).abs(), "b c t s d -> b (c t s) d")


def only_head(state: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    """Weights of a `HeadGrid` as those of a `Classifier` with one of its heads."""
    heads, chosen = "heads.", f"heads.{number}."
    return {
        name.removeprefix(chosen): value
        for name, value in state.items()
        if name.startswith(chosen) or not name.startswith(heads)
    }


def pooled_together(tokens: Tensor, views: tuple[int, int]) -> Tensor:
    """Tokens of clips, those of the temporal views of a video as one sequence."""
    temporal, spatial = views
    return rearrange(tokens, "(b t s) n d -> (b s) (t n) d", t=temporal, s=spatial)


def of_each_clip(logits: Tensor, views: tuple[int, int]) -> Tensor:
    """Logits of sequences of `pooled_together`, for each of their clips."""
    temporal, spatial = views
    return repeat(logits, "(b s) c -> (b t s) c", t=temporal, s=spatial)


@torch.no_grad()
def _divide(linear: nn.Linear, number: float) -> None:
    linear.weight.div_(number)
