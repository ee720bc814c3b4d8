"""A differentiable choice of the k best of n: perturbed top-k, as a mask.

The mean over noise of "is it among the k best?" is a smooth function of the scores, and its
gradient is an expectation too (Berthet et al. 2020, arXiv 2002.08676; for patches, Cordonnier et
al. 2021, arXiv 2104.03059).

B clips, n items, k of them kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from arvideo_ds.models.draws import random_normals

_PURPOSE = 16
# Numbers of a clip's noise that are drawn at a time, to bound the memory.
_CHUNK = 2**16


def top_k(scores: Tensor, k: int) -> Tensor:
    """True at the k largest of the last axis; exactly k, also with equal scores."""
    chosen = scores.topk(k, dim=-1, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, value=True)


def perturbed_top_k(scores: Tensor, k: int, keys: Tensor, *, samples: int, sigma: float) -> Tensor:
    """Mean mask over `samples` of the k largest of scores + sigma x noise: B n float32, sum k.

    scores: B n; sigma is in their unit. keys: int64, B; they determine the normal noise, which is
    drawn again in the backward pass to save memory. The gradient is the unbiased estimate: mean
    over samples of (g . (mask - mask without noise)) noise / sigma, in which the mask without noise
    only reduces the variance.
    """
    return _PerturbedTopK.apply(scores.float(), k, keys, samples, sigma)


class _PerturbedTopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, k: int, keys: Tensor, samples: int, sigma: float
    ) -> Tensor:
        ctx.save_for_backward(scores, keys)
        ctx.k, ctx.samples, ctx.sigma = k, samples, sigma
        counts = torch.zeros_like(scores)
        for noise in _noise(keys, samples, scores.shape[1]):
            counts += top_k(noise.mul_(sigma).add_(scores[:, None]), k).sum(dim=1)
        return counts / samples

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        scores, keys = ctx.saved_tensors
        unperturbed = (gradient * top_k(scores, ctx.k)).sum(dim=-1, keepdim=True)
        total = torch.zeros_like(scores)
        for noise in _noise(keys, ctx.samples, scores.shape[1]):
            kept = top_k(scores[:, None] + ctx.sigma * noise, ctx.k)
            gain = torch.einsum("bn,bsn->bs", gradient, kept.to(gradient.dtype)) - unperturbed
            total += torch.einsum("bs,bsn->bn", gain, noise)
        return total / (ctx.samples * ctx.sigma), None, None, None, None


def _noise(keys: Tensor, samples: int, size: int) -> Iterator[Tensor]:
    """Standard normal noise, B s n, for a few samples at a time."""
    step = max(1, _CHUNK // size)
    for first in range(0, samples, step):
        count = min(step, samples - first)
        yield random_normals(keys, _PURPOSE, (count, size), start=first * size)
