"""The encoder that every objective shares and that is fine-tuned afterwards: a plain ViT.

B clips, M tokens, P values of a cube, D width.
"""

from __future__ import annotations

import functools

from timm.models.vision_transformer import Block
from torch import Tensor, nn

from arvideo_ds.models.cubes import standardize

layer_norm = functools.partial(nn.LayerNorm, eps=1e-6)


class Encoder(nn.Module):
    """Pre-norm ViT over any subset of a clip's tokens.

    `positions` is the table of the whole grid, N D; `cube_values` P; `mlp` the hidden width.
    """

    positions: Tensor

    def __init__(
        self, *, positions: Tensor, cube_values: int, depth: int, heads: int, mlp: int
    ) -> None:
        super().__init__()
        width = positions.shape[1]
        self.embed = nn.Linear(cube_values, width)
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio=mlp / width, qkv_bias=True, norm_layer=layer_norm)
            for _ in range(depth)
        )
        self.norm = layer_norm(width)
        # Recomputed from the shape, so no checkpoint holds it.
        self.register_buffer("positions", positions, persistent=False)
        initialize(self)

    def forward(self, cubes: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encode the given tokens only.

        cubes: B M P, uint8 or 0..1. tokens: B M, their places in the grid. mask: M M, True = may
        attend; none = full attention. Returns B M D.
        """
        pixels = standardize(cubes).to(self.embed.weight.dtype)
        # Engines differ in whether they cast buffers along with the weights.
        x = self.embed(pixels) + self.positions[tokens].to(pixels.dtype)
        for block in self.blocks:
            x = block(x, attn_mask=mask)
        return self.norm(x)


def initialize(module: nn.Module) -> None:
    """Xavier-uniform matrices and zero biases, as VideoMAE starts; norms keep 1 and 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
