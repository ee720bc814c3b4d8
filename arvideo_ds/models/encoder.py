"""The encoder that every objective pretrains and that is fine-tuned: a plain ViT.

B clips, M tokens, P values of a cube, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from arvideo_ds.config.sizes import EncoderSpec
from arvideo_ds.geometry import Triple
from arvideo_ds.models.cubes import pick, standardize, to_cubes
from arvideo_ds.models.positions import interpolated_positions
from arvideo_ds.registry import Registry

NORM_EPSILON = 1e-6
layer_norm = functools.partial(nn.LayerNorm, eps=NORM_EPSILON)


class Encoder(nn.Module):
    """Pre-norm ViT over any subset of a clip's tokens.

    positions: the table of the whole grid, N D. cube_values: P. mlp: hidden width. drop_path: rate
    of stochastic depth in the last block, growing from 0 in the first. final_norm: LayerNorm after
    the last block.
    """

    positions: Tensor

    def __init__(
        self,
        *,
        positions: Tensor,
        cube_values: int,
        depth: int,
        heads: int,
        mlp: int,
        drop_path: float = 0.0,
        final_norm: bool = True,
    ) -> None:
        super().__init__()
        width = positions.shape[1]
        self.embed = nn.Linear(cube_values, width)
        self.blocks = nn.ModuleList(
            Block(
                width,
                heads,
                mlp_ratio=mlp / width,
                qkv_bias=True,
                drop_path=drop_path * number / max(1, depth - 1),
                norm_layer=layer_norm,
            )
            for number in range(depth)
        )
        self.norm = layer_norm(width) if final_norm else nn.Identity()
        # Computed from the shape, so checkpoints do not contain it.
        self.register_buffer("positions", positions, persistent=False)
        initialize(self)

    def forward(
        self,
        cubes: Tensor,
        tokens: Tensor,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Encode the given tokens only.

        cubes: B M P, uint8 or 0..1. tokens: B M, their indices in the grid. mask: M M, as PyTorch's
        attention takes it; None = full attention. positions: N D, for another grid than the
        encoder's. Returns B M D.
        """
        x = self.embed_cubes(cubes, tokens, positions)
        for block in self.blocks:
            x = block(x, attn_mask=mask)
        return self.norm(x)

    def embed_cubes(self, cubes: Tensor, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Cubes B M P of tokens B M to embeddings with positions, B M D."""
        table = self.positions if positions is None else positions
        pixels = standardize(cubes).to(self.embed.weight.dtype)
        # Engines differ in whether they cast buffers along with the weights.
        return self.embed(pixels) + table[tokens].to(pixels.dtype)


def build_encoder(spec: EncoderSpec, *, drop_path: float = 0.0, final_norm: bool = True) -> Encoder:
    """The encoder of `spec.backbone`; keywords as in `Encoder`."""
    return ENCODERS[spec.backbone](spec, drop_path=drop_path, final_norm=final_norm)


def _vit(spec: EncoderSpec, *, drop_path: float, final_norm: bool) -> Encoder:
    size = spec.size
    return Encoder(
        positions=encoder_positions(spec, size.width),
        cube_values=spec.geometry.cube_values,
        depth=size.depth,
        heads=size.heads,
        mlp=size.mlp,
        drop_path=drop_path,
        final_norm=final_norm,
    )


def encoder_positions(spec: EncoderSpec, width: int) -> Tensor:
    """The position table of the encoder's grid, N x width; the decoder's is of another width."""
    grid = spec.geometry.grid
    return interpolated_positions(spec.positions, spec.pretrained_grid or grid, grid, width)


# Builders by `model.name`: `(spec, *, drop_path, final_norm)` to a module with Encoder's `forward`,
# `positions` and `blocks`.
ENCODERS: Registry[Callable[..., Encoder]] = Registry("backbone", {"vit": _vit})


def encode_clips(
    encoder: Encoder,
    clips: Tensor,
    patch: Triple,
    tokens: Tensor | None = None,
    *,
    positions: Tensor | None = None,
) -> Tensor:
    """Encode clips B T H W 3 with full attention: B N D.

    tokens: B M, the only ones that are encoded (then B M D); None = all N. positions: table of the
    clips' grid where it is not the encoder's.
    """
    cubes = to_cubes(clips, patch)
    if tokens is not None:
        return encoder(pick(cubes, tokens), tokens)
    tokens = torch.arange(cubes.shape[1], device=cubes.device).expand(cubes.shape[:2])
    return encoder(cubes, tokens, positions=positions)


def initialize(module: nn.Module) -> None:
    """Xavier-uniform matrices and zero biases, as VideoMAE starts; norms keep 1 and 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def linear_head(width: int, outputs: int) -> nn.Linear:
    """A linear layer near zero: the first steps move the head, not the pretrained encoder."""
    head = nn.Linear(width, outputs)
    nn.init.trunc_normal_(head.weight, std=2e-5)
    nn.init.zeros_(head.bias)
    return head
