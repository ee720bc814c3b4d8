"""Backbones, their size tables, and the descriptions that models are built from.

Source: ViT-S/B/L/H/g as in VideoMAE and VideoMAE V2 (arXiv 2203.12602, 2303.16727), ViT-G from
"Scaling Vision Transformers" (arXiv 2106.04560); decoder of ARVideo, section 4.1, and VideoMAE V2's
decoder width (models/modeling_pretrain.py), with the same width per head. VideoMAE's ViT-H has a
decoder of width 640 and 8 heads, set in its recipes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from arvideo_ds.geometry import Geometry, Triple
from arvideo_ds.registry import Registry


@dataclass(frozen=True)
class Size:
    """Shape of an encoder and of its default decoder."""

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
    "nano": Size(64, 4, 2, 256, 4, 48, 2, 2, 48),
    "tiny": Size(128, 4, 4, 512, 4, 96, 2, 3, 96),
    "S": Size(384, 12, 6, 1536, 16, 192, 4, 3, 192),
    "B": Size(768, 12, 12, 3072, 16, 512, 4, 8, 384),
    "L": Size(1024, 24, 16, 4096, 16, 512, 4, 8, 512),
    "H": Size(1280, 32, 16, 5120, 16, 512, 4, 8, 512),
    "g": Size(1408, 40, 16, 6144, 14, 512, 4, 8, 512),
    "G": Size(1664, 48, 16, 8192, 14, 512, 4, 8, 512),
}
# Sizes of each `model.name`; its builder is in models/encoder.py.
BACKBONES: Registry[Mapping[str, Size]] = Registry("backbone", {"vit": SIZES})
# How a classifier makes one vector of the tokens (models/classifier.py).
Pooling = Literal["mean", "motion", "attention", "attentive"]
TUBELET = 2
DECODER_MLP_RATIO = 4
PROBE_MLP_RATIO = 4


@dataclass(frozen=True)
class EncoderSpec:
    """What an encoder is built from. backbone: `model.name`.

    pretrained_grid: token grid from which the position table is interpolated, if any.
    """

    geometry: Geometry
    size: Size
    positions: str = "sincos_1d"
    pretrained_grid: Triple | None = None
    backbone: str = "vit"


@dataclass(frozen=True)
class DecoderShape:
    """Layers between encoder and loss: what models/decoder.py builds and planning counts.

    crosses: queries attend to the encoded tokens under a mask of steps; else encoded and hidden
    tokens form one sequence. self_attention: the decoder's tokens attend to each other.
    """

    width: int
    depth: int
    heads: int
    crosses: bool = False
    self_attention: bool = True


@dataclass(frozen=True)
class TeacherShape:
    """A frozen ViT beside the trained model: its size, and the tokens that it cuts a clip into.

    scores: its class scores are learnt, else the features of its tokens. aligned: of the encoded
    tokens, the only ones that it sees.
    """

    size: Size
    geometry: Geometry
    scores: bool = False
    aligned: bool = False


@dataclass(frozen=True)
class Transformer:
    """The model that a recipe trains, as planning counts it: an encoder and what follows it.

    masked: the encoder attends under a mask. class_attention: one such layer pools the encoded
    tokens, else their mean. outputs: values predicted per token, or outputs of the linear head; 0:
    none, or not known yet.
    mixes_clips: the clips of a micro-batch are mixed in pairs, in fp32. frozen: the encoder's
    weights are not trained. lora_rank: of trained adapters in its attention, with lora_mlp also in
    its MLPs; 0: none. attentive: blocks of the attentive pooling, 0: none; heads: that pool and
    classify the same tokens; together: clips whose tokens are pooled together.
    """

    size: Size
    name: str
    decoder: DecoderShape | None = None
    masked: bool = False
    class_attention: bool = False
    outputs: int = 0
    mixes_clips: bool = False
    teacher: TeacherShape | None = None
    frozen: bool = False
    lora_rank: int = 0
    lora_mlp: bool = False
    attentive: int = 0
    heads: int = 1
    together: int = 1
