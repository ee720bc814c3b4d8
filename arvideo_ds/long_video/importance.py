"""Importance of tokens, and the differentiable choice of the most important ones.

A token's importance is how much it differs from the same place one time earlier. The choice is a
perturbed top-k, as a mask: the mean over noise of "is it among the k best?" is a smooth function of
the scores, and its gradient is an expectation too (Berthet et al. 2020, arXiv 2002.08676; for
patches, Cordonnier et al. 2021, arXiv 2104.03059).

B clips, T H W frames and pixels, t h w token grid, n scored tokens, k of them kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arvideo_ds.config.tokenizer import scorer_kernel, scorer_strides
from arvideo_ds.geometry import CHANNELS, Triple
from arvideo_ds.models.draws import random_normals

_EPSILON = 1e-6
_NOISE_PURPOSE = 16
# Numbers of a clip's noise that are drawn at a time, to bound the memory.
_CHUNK = 2**16


class Float32Conv3d(nn.Conv3d):
    """A convolution in float32 in any precision of the run: a choice (of tokens, of codes) depends
    on its last digits. Its gradient may be in TF32."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        # By default, cuDNN rounds the inputs of a float32 convolution to ten bits of mantissa.
        cudnn = torch.backends.cudnn
        flags = {name: getattr(cudnn, name) for name in ("enabled", "benchmark", "deterministic")}
        with cudnn.flags(**flags, allow_tf32=False):
            return self._conv_forward(x.float(), self.weight.float(), bias)


class TokenScorer(nn.Module):
    """Two strided convolutions to the token grid, and the change of their features over time.

    Source: LVMAE (arXiv 2411.13683), section 3, which gives no kernel sizes.
    """

    def __init__(self, patch: Triple, width: int) -> None:
        super().__init__()
        first, second = scorer_strides(patch)
        self.first = _strided(CHANNELS, width, first)
        self.second = _strided(width, width, second)

    def forward(self, pixels: Tensor) -> Tensor:
        """Importance of the tokens from the second time on, float32: B t-1 h w.

        pixels: B 3 T H W. Importance is the Euclidean distance between the features of a token and
        of the same place one time earlier.
        """
        features = self.second(F.silu(self.first(pixels)))
        change = features[:, :, 1:] - features[:, :, :-1]
        # The root has no derivative at 0, where nothing moved.
        return (change.square().sum(dim=1) + _EPSILON**2).sqrt()


def normalize_scores(scores: Tensor) -> Tensor:
    """Scores of each clip, B n, with mean 0 and standard deviation 1."""
    variance, mean = torch.var_mean(scores, dim=1, keepdim=True)
    # The root has no derivative at 0, the variance of a still clip.
    return (scores - mean) / (variance + _EPSILON**2).sqrt()


def _strided(inputs: int, outputs: int, stride: Triple) -> Float32Conv3d:
    t, h, w = (step // 2 for step in stride)
    # Zeros before the first frame would look like a change.
    return Float32Conv3d(
        inputs,
        outputs,
        scorer_kernel(stride),
        stride=stride,
        padding=(t, h, w),
        padding_mode="replicate",
    )


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
        yield random_normals(keys, _NOISE_PURPOSE, (count, size), start=first * size)
