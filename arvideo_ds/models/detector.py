"""A detector of actions: what the person in a box does, from a clip around the keyframe.

B clips, T H W frames and pixels, t h w token grid, D width, R boxes of all clips, A actions.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torchvision.ops import roi_align

from arvideo_ds.config import DetectRecipe
from arvideo_ds.models.encoder import build_encoder, encode_clips, layer_norm

# Cells that RoIAlign reads of a box, along height and width.
_CELLS = 7


class Detector(nn.Module):
    """The pretrained encoder, its tokens averaged over time, RoIAlign, LayerNorm, one linear layer.

    Of the cells of a box the largest value of each feature is taken, as AVA's detectors do. The
    encoder's own last norm is left out, as in `Classifier`: the box's token is normalised.
    Source: METHOD, section 4; SlowFast's and VideoMAE's heads for AVA.
    """

    def __init__(self, recipe: DetectRecipe, *, drop_path: float = 0.0) -> None:
        super().__init__()
        self.patch, self.grid = recipe.patch, recipe.geometry.grid
        self.encoder = build_encoder(recipe, drop_path=drop_path, final_norm=False)
        self.norm = layer_norm(recipe.size.width)
        self.head = nn.Linear(recipe.size.width, recipe.detect.num_actions)
        # Near zero: the first steps move the head, not the pretrained encoder.
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    def forward(self, clips: Tensor, boxes: Tensor, clip_of: Tensor) -> Tensor:
        """Logits R A of boxes R 4 (x1 y1 x2 y2, pixels) in clips B T H W 3; clip_of: R, whose."""
        return self.head(self.norm(self.features(clips, boxes, clip_of)))

    def features(self, clips: Tensor, boxes: Tensor, clip_of: Tensor) -> Tensor:
        """What is read off each box, R D, before the norm."""
        tokens = encode_clips(self.encoder, clips, self.patch)
        t, h, w = self.grid
        maps = rearrange(tokens, "b (t h w) d -> b d t h w", t=t, h=h, w=w).mean(2)
        _, tall, wide = self.patch
        left, top, right, bottom = boxes.float().unbind(1)
        sides = left / wide, top / tall, right / wide, bottom / tall
        places = torch.stack([clip_of.float(), *sides], dim=1)
        # In float32: a CPU's kernel knows no bfloat16, and boxes need the digits.
        cells = roi_align(maps.float(), places, output_size=_CELLS, aligned=True)
        return cells.amax(dim=(2, 3)).to(tokens.dtype)
