"""Fine-tuning with a frozen encoder: the layers after it alone, or low-rank adapters inside it too.

Source: LoRA (Hu et al. 2021, arXiv 2106.09685).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arvideo_ds.config.finetune import FinetuneSettings
from arvideo_ds.errors import UserError
from arvideo_ds.models.weight_files import State

# Names of the adapted linear layers in timm's blocks: of attention, and of the MLP.
_ATTENTION, _MLP = ("qkv", "proj"), ("fc1", "fc2")
_DOWN, _UP = "lora_down", "lora_up"


class LoraLinear(nn.Linear):
    """A frozen linear layer and a trained update of low rank: W x + b + (alpha / rank) B A x.

    W and b keep their names. A (`lora_down`) starts uniform as torch's linear layers do, from
    torch's generator, B (`lora_up`) at zero: the first output is the frozen layer's. dropout: of
    the update's input while training.
    """

    def __init__(self, linear: nn.Linear, *, rank: int, alpha: float, dropout: float) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = alpha / rank
        self.lora_dropout = nn.Dropout(dropout)
        self.lora_down = nn.Parameter(torch.empty(rank, linear.in_features))
        self.lora_up = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        update = F.linear(F.linear(self.lora_dropout(x), self.lora_down), self.lora_up)
        return F.linear(x, self.weight, self.bias) + self.scale * update


def freeze_encoder(model: nn.Module, settings: FinetuneSettings) -> None:
    """Freeze what `finetune.train` does not train, and add its adapters. model: with `encoder`.

    Errors: `UserError` where the encoder has no layers to adapt.
    """
    if settings.train == "all":
        return
    encoder: Any = model.encoder
    encoder.requires_grad_(False)
    if settings.train == "head":
        return
    adapted = _ATTENTION + (_MLP if settings.lora_mlp else ())
    layers = {
        name: layer
        for name, layer in encoder.blocks.named_modules()
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in adapted
    }
    if not layers:
        raise UserError(
            f"finetune.train=lora adapts linear layers named {', '.join(adapted)} in the encoder's "
            "blocks, and this model.name has none. Use finetune.train=all or head."
        )
    rank, alpha, dropout = settings.lora_rank, settings.lora_alpha, settings.lora_dropout
    for name, layer in layers.items():
        lora = LoraLinear(layer, rank=rank, alpha=alpha, dropout=dropout)
        encoder.blocks.set_submodule(name, lora)


def merge_adapters(state: State, settings: FinetuneSettings) -> State:
    """Weights in fp32 with W + (alpha / rank) B A in place of W, A and B."""
    merged = {name: value for name, value in state.items() if not name.endswith((_DOWN, _UP))}
    for name, up in state.items():
        if name.endswith(_UP):
            layer = name.removesuffix(_UP)
            update = up.double() @ state[layer + _DOWN].double()
            weight = merged[f"{layer}weight"].double()
            scale = settings.lora_alpha / settings.lora_rank
            merged[f"{layer}weight"] = (weight + scale * update).to(up.dtype)
    return merged
