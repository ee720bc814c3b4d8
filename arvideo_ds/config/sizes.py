"""The size table: encoder and default decoder of every model size.

Source: ViT-S/B/L/H/g as in VideoMAE and VideoMAE V2 (arXiv 2203.12602, 2303.16727), ViT-G from
"Scaling Vision Transformers" (arXiv 2106.04560); decoder of ARVideo, section 4.1, and its width in
the models of VideoMAE V2's code (models/modeling_pretrain.py), whose width of a head is the same.
VideoMAE's own ViT-H has a decoder of width 640 and 8 heads, which its recipes say.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    width: int
    depth: int
    heads: int
    mlp: int
    patch: int
    decoder_width: int
    decoder_depth: int
    decoder_heads: int
    videomae_decoder_width: int


SIZES: dict[str, Size] = {
    #          width depth heads mlp patch  decoder: width depth heads, VideoMAE's width
    "tiny": Size(128, 4, 4, 512, 4, 96, 2, 3, 96),
    "S": Size(384, 12, 6, 1536, 16, 192, 4, 3, 192),
    "B": Size(768, 12, 12, 3072, 16, 512, 4, 8, 384),
    "L": Size(1024, 24, 16, 4096, 16, 512, 4, 8, 512),
    "H": Size(1280, 32, 16, 5120, 16, 512, 4, 8, 512),
    "g": Size(1408, 40, 16, 6144, 14, 512, 4, 8, 512),
    "G": Size(1664, 48, 16, 8192, 14, 512, 4, 8, 512),
}
TUBELET = 2
DECODER_MLP_RATIO = 4
