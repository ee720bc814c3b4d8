"""Cubes: the pixels of one token, cut out, picked, normalised.

B clips, T H W frames and pixels, t h w token grid, N tokens, M picked tokens, P values of a cube.
"""

from __future__ import annotations

import functools

import torch
from einops import rearrange
from torch import Tensor

from arvideo_ds.geometry import CHANNELS, Triple

# Mean and deviation of ImageNet's channels, on pixels of 0..1, as VideoMAE uses them.
PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_TARGET_EPSILON = 1e-6


def to_cubes(clips: Tensor, patch: Triple) -> Tensor:
    """Clips B T H W 3 -> cubes B N P of the same type; P is (frame, row, column, colour)."""
    pt, ph, pw = patch
    return rearrange(
        clips, "b (t pt) (h ph) (w pw) c -> b (t h w) (pt ph pw c)", pt=pt, ph=ph, pw=pw
    )


def from_cubes(cubes: Tensor, patch: Triple, grid: Triple) -> Tensor:
    """Cubes B N P -> clips B T H W 3; the inverse of `to_cubes`."""
    (pt, ph, pw), (t, h, w) = patch, grid
    return rearrange(
        cubes,
        "b (t h w) (pt ph pw c) -> b (t pt) (h ph) (w pw) c",
        t=t, h=h, w=w, pt=pt, ph=ph, pw=pw,
    )  # fmt: skip


def pick(cubes: Tensor, tokens: Tensor) -> Tensor:
    """Cubes B N P at tokens B M -> B M P."""
    return cubes.gather(1, tokens[..., None].expand(-1, -1, cubes.shape[-1]))


def unit_pixels(cubes: Tensor) -> Tensor:
    """uint8 0..255 -> float32 0..1; floating cubes are 0..1 already and only become float32."""
    return cubes.float() / 255 if cubes.dtype == torch.uint8 else cubes.float()


def standardize(cubes: Tensor) -> Tensor:
    """What the encoder sees: pixels less ImageNet's mean, over its deviation, float32."""
    mean, std = pixel_statistics(cubes.device)
    pixels = _by_channel(unit_pixels(cubes))
    return rearrange((pixels - mean) / std, "b m p c -> b m (p c)")


def pixel_targets(cubes: Tensor, *, normalize: bool) -> Tensor:
    """What the decoder is to predict, float32, B M P.

    Normalised: per cube and channel, less the mean and over (deviation + 1e-6) of the cube's
    pixel positions, variance unbiased. Else plain pixels of 0..1.
    Source: VideoMAE (arXiv 2203.12602) and ARVideo, section 4.1.
    """
    pixels = unit_pixels(cubes)
    if not normalize:
        return pixels
    pixels = _by_channel(pixels)
    mean, std = _statistics(pixels)
    return rearrange((pixels - mean) / std, "b m p c -> b m (p c)")


def target_statistics(cubes: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation + 1e-6 of each cube's channels, each B M 1 3; pictures undo with them."""
    return _statistics(_by_channel(unit_pixels(cubes)))


def _by_channel(pixels: Tensor) -> Tensor:
    return rearrange(pixels, "b m (p c) -> b m p c", c=CHANNELS)


def _statistics(pixels: Tensor) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(pixels, dim=2, unbiased=True, keepdim=True)
    return mean, variance.sqrt() + _TARGET_EPSILON


@functools.lru_cache
def pixel_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """PIXEL_MEAN and PIXEL_STD on a device, to which they are sent once: each 3, float32."""
    # Not buffers: DeepSpeed casts every floating buffer to the run's precision, and pixels are
    # normalised in float32 whatever that is.
    with torch.inference_mode(False):  # or a first call under it would spoil all later training
        return torch.tensor(PIXEL_MEAN, device=device), torch.tensor(PIXEL_STD, device=device)
