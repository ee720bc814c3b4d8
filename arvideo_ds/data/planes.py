"""Clips as planes (YUV 4:2:0), half the bytes of RGB, which the device converts to RGB.

A packed clip is F 3h/2 w: h rows of luma, then h/2 rows with U at the left and V at the right.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from arvideo_ds.data.transforms import Crop, Sides

# ITU-R BT.601, limited range (luma 16..235, colour differences 128 +- 112), in units of 2^-13. So
# does FFmpeg where a video does not name its colours; transcoded videos do not.
_LUMA, _RED_V, _GREEN_U, _GREEN_V, _BLUE_U = 9539, 13075, -3209, -6660, 16525
_BITS = 13
_BLACK, NO_COLOUR = 16, 128
# Clips converted at once: this bounds the memory of the intermediate integers.
_AT_ONCE = 8
# torchvision resizes up to four channels of bytes at once.
_CHANNELS = 4


def cut_planes(frames: np.ndarray, crop: Crop, size: Sides, *, flip: bool) -> Tensor:
    """Packed frames F 3H/2 W -> packed clip F 3h/2 w. The crop is extended to even pixels, so that
    luma and colour stay aligned."""
    planes = torch.from_numpy(frames)
    height, (rows, columns) = planes.shape[1] * 2 // 3, size
    top, left = crop.top // 2, crop.left // 2
    bottom, right = -(-(crop.top + crop.height) // 2), -(-(crop.left + crop.width) // 2)
    half = Crop(top, left, bottom - top, right - left)
    whole = Crop(*(2 * side for side in half))
    colours = planes[:, height:].unflatten(2, (2, -1)).permute(2, 0, 1, 3)
    clip = planes.new_empty(len(planes), rows * 3 // 2, columns)
    clip[:, :rows] = _resized(planes[:, :height], whole, size, flip)
    for place, colour in zip(clip[:, rows:].split(columns // 2, dim=2), colours, strict=True):
        place.copy_(_resized(colour, half, (rows // 2, columns // 2), flip))
    return clip


def _resized(plane: Tensor, crop: Crop, size: Sides, flip: bool) -> Tensor:
    """F H W -> F h w."""
    plane = plane[:, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    channels = _CHANNELS if len(plane) % _CHANNELS == 0 else 1
    resized = F.resize(plane.unflatten(0, (-1, channels)), list(size), antialias=True).flatten(0, 1)
    return resized.flip(2) if flip else resized


def to_rgb(clips: Tensor) -> Tensor:
    """Packed clips B F 3h/2 w (uint8) -> B F h w 3 (uint8), within 1 of FFmpeg's conversion."""
    return torch.cat([_rgb(part) for part in clips.split(_AT_ONCE)])


def _rgb(packed: Tensor) -> Tensor:
    rows = packed.shape[-2] * 2 // 3
    luma = _times(packed[..., :rows, :].int() - _BLACK, _LUMA)
    u, v = (packed[..., rows:, :].int() - NO_COLOUR).unflatten(-1, (2, -1)).unbind(-2)
    red, blue = _times(v, _RED_V), _times(u, _BLUE_U)
    green = _times(u, _GREEN_U) + _times(v, _GREEN_V)
    rgb = torch.stack([luma + _doubled(colour) for colour in (red, green, blue)], dim=-1)
    return rgb.clamp_(0, 255).to(torch.uint8)


def _times(values: Tensor, factor: int) -> Tensor:
    """Rounded down, as each product in FFmpeg."""
    return (values * factor) >> _BITS


def _doubled(plane: Tensor) -> Tensor:
    """... h w -> ... 2h 2w: each value for four pixels."""
    return plane.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1)
