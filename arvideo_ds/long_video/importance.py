"""The token scorer: how much each token differs from the same place one time earlier.

B clips, T H W frames and pixels, t h w token grid.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arvideo_ds.config.tokenizer import scorer_kernel, scorer_strides
from arvideo_ds.geometry import CHANNELS, Triple

_EPSILON = 1e-6


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
