"""An action detector: what the person in a box does, from a clip around the keyframe.

B clips, T H W frames and pixels, t h w token grid, D width, R boxes of all clips, A actions.
"""

from __future__ import annotations

import functools

import torch
from einops import rearrange
from torch import Tensor, nn
from torchvision.ops import roi_align

from arvideo_ds.config.detect import DetectSettings
from arvideo_ds.config.sizes import EncoderSpec
from arvideo_ds.geometry import Geometry, Triple
from arvideo_ds.models.encoder import build_encoder, encode_clips, layer_norm, linear_head
from arvideo_ds.models.positions import interpolated_positions

# Cells of RoIAlign along a box's height and width.
_CELLS = 7


class Detector(nn.Module):
    """The pretrained encoder, its tokens averaged over time, RoIAlign, one linear layer.

    The cells of a box are max-pooled. `settings.norm` decides where the norm between encoder and
    head is. Clips may have another shape than the encoder's: their positions are then interpolated.
    Source: VideoMAE's action detection (modeling_finetune.py), with norm=tokens and
    roi_aligned=false.
    """

    def __init__(
        self, encoder: EncoderSpec, settings: DetectSettings, *, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        width = encoder.size.width
        self.patch, self.grid = encoder.geometry.patch, encoder.geometry.grid
        self.aligned = settings.roi_aligned
        # Scheme and grid of the positions that the encoder was pretrained with.
        self.positions = encoder.positions, encoder.pretrained_grid or self.grid
        after_pooling = settings.norm == "pooled"
        self.encoder = build_encoder(encoder, drop_path=drop_path, final_norm=not after_pooling)
        self.norm = layer_norm(width) if after_pooling else nn.Identity()
        self.head = linear_head(width, settings.num_actions)

    def forward(self, clips: Tensor, boxes: Tensor, clip_of: Tensor) -> Tensor:
        """Logits R A of boxes R 4 (x1 y1 x2 y2, pixels) in clips B T H W 3.

        clip_of: R, index of each box's clip.
        """
        return self.head(self.norm(self.features(clips, boxes, clip_of)))

    def features(self, clips: Tensor, boxes: Tensor, clip_of: Tensor) -> Tensor:
        """The pooled features of each box, R D, before `norm`."""
        _, frames, height, width, _ = clips.shape
        grid = Geometry.whole((frames, height, width), self.patch).grid
        table = None
        if grid != self.grid:
            table = _interpolated(*self.positions, grid, self.encoder.positions.shape[1])
            table = table.to(clips.device)
        maps = self.maps(clips, grid, table)
        _, tall, wide = self.patch
        left, top, right, bottom = boxes.float().unbind(1)
        sides = left / wide, top / tall, right / wide, bottom / tall
        places = torch.stack([clip_of.float(), *sides], dim=1)
        # In float32: the CPU kernel has no bfloat16, and boxes need the precision.
        cells = roi_align(maps.float(), places, output_size=_CELLS, aligned=self.aligned)
        return cells.amax(dim=(2, 3)).to(maps.dtype)

    def maps(self, clips: Tensor, grid: Triple, positions: Tensor | None) -> Tensor:
        """Encoded clips, averaged over time: B D h w. positions: of their grid (`encode_clips`)."""
        tokens = encode_clips(self.encoder, clips, self.patch, positions=positions)
        t, h, w = grid
        return rearrange(tokens, "b (t h w) d -> b d t h w", t=t, h=h, w=w).mean(2)


@functools.lru_cache(maxsize=8)
def _interpolated(scheme: str, known: Triple, grid: Triple, width: int) -> Tensor:
    """`interpolated_positions`, cached."""
    with torch.inference_mode(False):  # training may use the table after an evaluation
        return interpolated_positions(scheme, known, grid, width)
