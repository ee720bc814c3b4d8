"""Decoders: ARVideo's with cross-attention, VideoMAE's with mask tokens.

B clips, Q queries, M encoded tokens, N tokens of the grid, D encoder width, d decoder width,
P values of a cube.
"""

from __future__ import annotations

import torch
from einops import rearrange
from timm.layers import Mlp
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn
from torch.nn import functional as F

from arvideo_ds.config.sizes import DECODER_MLP_RATIO, DecoderShape, EncoderSpec
from arvideo_ds.models.encoder import encoder_positions, initialize, layer_norm


class CrossAttention(nn.Module):
    """Multi-head attention of queries B Q d to a memory B M d."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        q = rearrange(self.query(x), "b q (n d) -> b n q d", n=self.heads)
        k, v = rearrange(
            self.key_value(memory), "b m (two n d) -> two b n m d", two=2, n=self.heads
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.project(rearrange(out, "b n q d -> b q (n d)"))


class DecoderLayer(nn.Module):
    """[Self-attention,] cross-attention, MLP; pre-norm with residuals."""

    def __init__(self, width: int, heads: int, *, self_attention: bool) -> None:
        super().__init__()
        self.self_norm = layer_norm(width) if self_attention else None
        self.self_attention = (
            Attention(width, num_heads=heads, qkv_bias=True) if self_attention else None
        )
        self.cross_norm = layer_norm(width)
        self.cross_attention = CrossAttention(width, heads)
        self.mlp_norm = layer_norm(width)
        self.mlp = Mlp(width, hidden_features=DECODER_MLP_RATIO * width)

    def forward(
        self, x: Tensor, memory: Tensor, cross_mask: Tensor, self_mask: Tensor | None
    ) -> Tensor:
        if self.self_attention is not None and self.self_norm is not None:
            x = x + self.self_attention(self.self_norm(x), attn_mask=self_mask)
        x = x + self.cross_attention(self.cross_norm(x), memory, cross_mask)
        return x + self.mlp(self.mlp_norm(x))


class Alignment(nn.Module):
    """In place of a decoder: a linear layer from the encoder's output to a teacher's features."""

    def __init__(self, width: int, target_values: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, target_values)
        initialize(self)

    def forward(self, encoded: Tensor) -> Tensor:
        """Of encoded tokens B M D: B M P."""
        return self.head(encoded)


class CrossDecoder(nn.Module):
    """One query per predicted token: a learned vector + its fixed position.

    Source: ARVideo (arXiv 2405.15160), section 3.4, Tables 9 and 10.
    """

    positions: Tensor

    def __init__(self, encoder: EncoderSpec, shape: DecoderShape, target_values: int) -> None:
        super().__init__()
        width = shape.width
        self.memory = nn.Linear(encoder.size.width, width)
        self.query = nn.Parameter(torch.empty(width))
        self.layers = nn.ModuleList(
            DecoderLayer(width, shape.heads, self_attention=shape.self_attention)
            for _ in range(shape.depth)
        )
        self.norm = layer_norm(width)
        self.head = nn.Linear(width, target_values)
        table = encoder_positions(encoder, width)
        self.register_buffer("positions", table, persistent=False)
        initialize(self)
        nn.init.normal_(self.query, std=0.02)

    def forward(
        self, encoded: Tensor, places: Tensor, cross_mask: Tensor, self_mask: Tensor | None
    ) -> Tensor:
        """Predict the cubes of tokens `places` (B Q, indices in the grid): B Q P.

        encoded: B M D. cross_mask: Q M and self_mask: Q Q (with self-attention only), as PyTorch's
        attention takes them.
        """
        memory = self.memory(encoded)
        x = self.query + self.positions[places].to(memory.dtype)
        for layer in self.layers:
            x = layer(x, memory, cross_mask, self_mask)
        return self.head(self.norm(x))


class JointDecoder(nn.Module):
    """Self-attention over encoded tokens and a mask token for each hidden one.

    Source: VideoMAE (arXiv 2203.12602), section 3.1, and its code: no bias in the projection.
    """

    positions: Tensor

    def __init__(self, encoder: EncoderSpec, shape: DecoderShape, target_values: int) -> None:
        super().__init__()
        width = shape.width
        self.project = nn.Linear(encoder.size.width, width, bias=False)
        self.mask_token = nn.Parameter(torch.empty(width))
        self.layers = nn.ModuleList(
            Block(width, shape.heads, DECODER_MLP_RATIO, qkv_bias=True, norm_layer=layer_norm)
            for _ in range(shape.depth)
        )
        self.norm = layer_norm(width)
        self.head = nn.Linear(width, target_values)
        table = encoder_positions(encoder, width)
        self.register_buffer("positions", table, persistent=False)
        initialize(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, encoded: Tensor, seen: Tensor, hidden: Tensor) -> Tensor:
        """Predict the cubes of tokens `hidden` (B Q, indices in the grid): B Q P.

        encoded: B M D, of tokens `seen`, B M.
        """
        seen_tokens = self.project(encoded)
        positions = self.positions.to(seen_tokens.dtype)
        x = torch.cat([seen_tokens + positions[seen], self.mask_token + positions[hidden]], dim=1)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x[:, seen.shape[1] :]))
