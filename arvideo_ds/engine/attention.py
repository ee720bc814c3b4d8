"""The attention kernels of a run: their order of preference, and PyTorch's choice among them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from arvideo_ds.config import Recipe
from arvideo_ds.config.sizes import Transformer
from arvideo_ds.planning.plan import RunPlan

# PyTorch takes the first that can compute an attention: Flash has no masks, cuDNN and Flash compute
# in half precision only.
KERNELS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
# With so few keys torch's fused kernel for CPUs takes 1.3 to 8 times as long backwards in bf16 as
# its plain one (torch 2.15): a large part of a small model's step.
FEW_KEYS = 192
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class _Attention:
    """One kind of attention layer, of `heads` heads of `width` values each."""

    heads: int
    width: int
    queries: int
    keys: int
    masked: bool

    @property
    def breaks_cudnn(self) -> bool:
        # With a mask and half a tile of 128 keys left over, gradients of queries may be NaN on
        # Hopper (PyTorch issue 196678, since 2.11).
        return self.masked and self.keys % 128 == 64


def preferred_kernels(
    recipe: Recipe, device: torch.device
) -> contextlib.AbstractContextManager[None]:
    """Makes PyTorch choose in the order of `KERNELS`; on a CPU, the faster of its two."""
    layers = [layer for phase in recipe.by_phase() for _, layer in _attentions(phase, 1)]
    if device.type != "cuda":
        eager_bf16 = recipe.train.precision == "bf16" and recipe.train.compile is not True
        plain = eager_bf16 and all(layer.keys <= FEW_KEYS for layer in layers)
        return sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext()
    broken = any(layer.breaks_cudnn for layer in layers)
    allowed = [k for k in KERNELS if not (broken and k == SDPBackend.CUDNN_ATTENTION)]
    return sdpa_kernel(allowed, set_priority=True)


def chosen_kernels(recipe: Recipe, plan: RunPlan, device: torch.device) -> dict[str, str]:
    """The kernel of each kind of attention in a training step, where the caller is; by its name.

    Empty for a model without attention.
    """
    dtype, batch = _DTYPES[recipe.train.precision], plan.micro_batch
    chosen = {}
    for name, a in _attentions(recipe, plan.sequence_parallel):
        q, k, v = (
            torch.empty(batch, n, a.heads, a.width, dtype=dtype, device=device).transpose(1, 2)
            for n in (a.queries, a.keys, a.keys)
        )
        mask = torch.empty(a.queries, -(-a.keys // 8) * 8, dtype=dtype, device=device)
        choice = torch._fused_sdp_choice(
            q.requires_grad_(), k, v, attn_mask=mask[:, : a.keys] if a.masked else None
        )
        chosen[name] = SDPBackend(choice).name.lower()
    return chosen


def _attentions(recipe: Any, sharing: int) -> Iterator[tuple[str, _Attention]]:
    """sharing: ranks that share the heads of the encoder."""
    model: Transformer | None = recipe.transformer
    if model is None:
        return
    size, counts, decoder = model.size, recipe.counts, model.decoder
    seen, asked = counts.encoded, counts.decoded
    masked = model.masked
    width = size.width // size.heads
    yield "encoder", _Attention(size.heads // sharing, width, seen, seen, masked)
    if decoder is None:
        return
    heads, width = decoder.heads, decoder.width // decoder.heads
    if decoder.crosses:
        yield "decoder_cross", _Attention(heads, width, asked, seen, masked)
    if decoder.self_attention:
        yield "decoder_self", _Attention(heads, width, asked, asked, masked)
