"""Cubes: the pixels of one token, cut from clips, picked, normalised.

B clips, T H W frames and pixels, t h w token grid, N tokens, M picked tokens, P values of a cube.
"""

from __future__ import annotations

import functools

import torch
from einops import rearrange
from torch import Tensor

from arvideo_ds.geometry import CHANNELS, Triple

# Mean and standard deviation of ImageNet's channels, pixels 0..1, as in VideoMAE.
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
    """uint8 0..255 -> float32 0..1; floating cubes are 0..1 already."""
    return cubes.float() / 255 if cubes.dtype == torch.uint8 else cubes.float()


def standardize(cubes: Tensor) -> Tensor:
    """The encoder's input: pixels normalised with ImageNet's mean and deviation, float32."""
    mean, std = pixel_statistics(cubes.device)
    pixels = _by_channel(unit_pixels(cubes))
    return rearrange((pixels - mean) / std, "b m p c -> b m (p c)")


def pixel_targets(cubes: Tensor, *, normalize: bool) -> Tensor:
    """Targets of the decoder, float32, B M P.

    normalize: minus mean, over (deviation + 1e-6), per cube and channel, with the unbiased
    variance; else pixels 0..1. Source: VideoMAE (arXiv 2203.12602) and ARVideo, section 4.1.
    """
    pixels = unit_pixels(cubes)
    if not normalize:
        return pixels
    pixels = _by_channel(pixels)
    mean, std = _statistics(pixels)
    return rearrange((pixels - mean) / std, "b m p c -> b m (p c)")


def target_statistics(cubes: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation + 1e-6 of each cube's channels, each B M 1 3."""
    return _statistics(_by_channel(unit_pixels(cubes)))


def _by_channel(pixels: Tensor) -> Tensor:
    return rearrange(pixels, "b m (p c) -> b m p c", c=CHANNELS)


def _statistics(pixels: Tensor) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(pixels, dim=2, unbiased=True, keepdim=True)
    return mean, variance.sqrt() + _TARGET_EPSILON


def pixel_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """PIXEL_MEAN and PIXEL_STD on a device: each 3, float32."""
    # Not buffers: some versions of DeepSpeed cast them to the run's precision.
    if torch.compiler.is_compiling():  # a compiled graph fuses them, and cannot keep a cache
        return _make_statistics(device)
    return _cached_statistics(device)


@functools.lru_cache
def _cached_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # training may use them after an evaluation
        return _make_statistics(device)


def _make_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Made on the device: the host sends nothing."""
    channel = torch.arange(CHANNELS, device=device)

    def by_channel(first: float, second: float, third: float) -> Tensor:
        return torch.where(channel == 0, first, torch.where(channel == 1, second, third))

    return by_channel(*PIXEL_MEAN), by_channel(*PIXEL_STD)
