"""Crop, resize and flip of decoded frames F H W to clips F h w; uint8 in, uint8 out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from arvideo_ds.config.schema import DataSettings
from arvideo_ds.models.cubes import PIXEL_MEAN

# Steps of a smaller crop's place along each axis.
_QUARTERS = 4
# Random resized crop: tries, and largest ratio of the sides.
_TRIES, _MOST_ASPECT = 10, 4 / 3

Sides = tuple[int, int]


class Crop(NamedTuple):
    top: int
    left: int
    height: int
    width: int


def random_crop(
    height: int, width: int, data: DataSettings, patch: Sides, generator: Generator
) -> Crop:
    """The training crop of a frame by data.crop; patch: rows and columns, of "grid"."""
    if data.crop == "grid":
        return grid_crop(height, width, data.size, patch, generator)
    if data.crop == "random_resized":
        return random_resized_crop(height, width, data.crop_area, generator)
    if data.crop == "short_side":
        return short_side_crop(height, width, data.size, data.short_side, generator)
    return multi_scale_crop(height, width, data.size, data.crop_scales, generator)


def multi_scale_crop(
    height: int, width: int, size: Sides, scales: Sequence[float], generator: Generator
) -> Crop:
    """The largest box of the clip's aspect with its sides scaled by `scales`, at a random place.
    The scales of height and width differ by at most one step; the place is uniform over a 5x5 grid.
    Source: TSN's multi-scale cropping, as in VideoMAE."""
    box_height, box_width = _largest_box(height, width, size)
    first = int(generator.integers(len(scales)))
    near = [i for i in range(len(scales)) if abs(i - first) <= 1]
    second = near[int(generator.integers(len(near)))]
    crop_height = max(1, round(box_height * scales[first]))
    crop_width = max(1, round(box_width * scales[second]))
    row, column = generator.integers(_QUARTERS + 1, size=2)
    top = (height - crop_height) * int(row) // _QUARTERS
    left = (width - crop_width) * int(column) // _QUARTERS
    return Crop(top, left, crop_height, crop_width)


def random_resized_crop(
    height: int, width: int, area: tuple[float, float], generator: Generator
) -> Crop:
    """A box of a uniform share of the area and a log-uniform aspect from 3:4 to 4:3. The central
    crop if ten tries do not fit. Source: Inception's crop, as torchvision's RandomResizedCrop."""
    for _ in range(_TRIES):
        pixels = height * width * generator.uniform(*area)
        aspect = np.exp(generator.uniform(-np.log(_MOST_ASPECT), np.log(_MOST_ASPECT)))
        crop_height, crop_width = round((pixels / aspect) ** 0.5), round((pixels * aspect) ** 0.5)
        if 0 < crop_height <= height and 0 < crop_width <= width:
            top = int(generator.integers(height - crop_height + 1))
            left = int(generator.integers(width - crop_width + 1))
            return Crop(top, left, crop_height, crop_width)
    crop_height = min(height, round(width * _MOST_ASPECT))
    crop_width = min(width, round(height * _MOST_ASPECT))
    return Crop((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width)


def short_side_crop(
    height: int, width: int, size: Sides, short_side: int, generator: Generator
) -> Crop:
    """The clip's box in a frame scaled to a shorter side of `short_side` pixels. Its place is
    uniform over the pixels of the unscaled frame. Source: VideoMAE's action detection
    (data/transforms.py, short side 256, boxes of 224)."""
    scale = min(height, width) / short_side
    rows, columns = (max(1, round(side * scale)) for side in size)
    top = int(generator.integers(height - rows + 1))
    left = int(generator.integers(width - columns + 1))
    return Crop(top, left, rows, columns)


def grid_crop(height: int, width: int, size: Sides, patch: Sides, generator: Generator) -> Crop:
    """A box of the clip's size at a uniform multiple of the patch, in frames of `fit_to_grid`."""
    top, left = (
        step * int(generator.integers((side - length) // step + 1))
        for side, length, step in zip((height, width), size, patch, strict=True)
    )
    return Crop(top, left, *size)


def fit_to_grid(frames: np.ndarray, size: Sides, patch: Sides) -> np.ndarray:
    """Frames F H W 3 -> F h' w' 3 (uint8), the smallest that contain the clip's box. The aspect is
    kept; the longer side is cut at both ends to a multiple of the patch. So all clips of a video
    have the same tokens."""
    (height, width), (rows, columns) = frames.shape[1:3], size
    scale = max(rows / height, columns / width)
    fitted = max(rows, round(height * scale)), max(columns, round(width * scale))
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)
    pixels = F.resize(pixels, list(fitted), antialias=True).permute(0, 2, 3, 1)
    kept = [side // step * step for side, step in zip(fitted, patch, strict=True)]
    top, left = ((side - length) // 2 for side, length in zip(fitted, kept, strict=True))
    return pixels[:, top : top + kept[0], left : left + kept[1]].contiguous().numpy()


def view_crop(
    height: int,
    width: int,
    size: Sides,
    view: int = 0,
    views: int = 1,
    *,
    short_side: int | None = None,
) -> Crop:
    """The box of a test view, at place `view` of `views` from one end of the frame to the other
    along the axis where it may move further, central along the other; a single view is the centre.

    The box is the largest of the clip's aspect; with short_side, it has the clip's size in a frame
    resized to that shorter side (data.test_short_side).
    """
    largest = _largest_box(height, width, size)
    if short_side is not None:
        scale = min(height, width) / short_side
        largest = size[0] * scale, size[1] * scale
    box_height, box_width = (max(1, round(side)) for side in largest)
    slack = height - box_height, width - box_width
    share = view / (views - 1) if views > 1 else 0.5
    shares = (share, 0.5) if slack[0] >= slack[1] else (0.5, share)
    return Crop(int(shares[0] * slack[0]), int(shares[1] * slack[1]), box_height, box_width)


def whole_frame(height: int, width: int, short_side: int, patch: Sides) -> tuple[Sides, Sides]:
    """Size of a frame scaled to a shorter side of `short_side`, and the rows and columns to add for
    a multiple of the patch."""
    scale = short_side / min(height, width)
    # Rounded down as in the official code.
    rows, columns = (max(short_side, int(side * scale)) for side in (height, width))
    return (rows, columns), (-rows % patch[0], -columns % patch[1])


def fill_up(clip: Tensor, missing: Sides) -> Tensor:
    """Clip F h w 3 with `missing` rows below and columns at the right of ImageNet's mean colour,
    which the encoder normalises to zero."""
    frames, rows, columns, _ = clip.shape
    mean = torch.tensor([round(255 * value) for value in PIXEL_MEAN], dtype=torch.uint8)
    filled = mean.expand(frames, rows + missing[0], columns + missing[1], 3).clone()
    filled[:, :rows, :columns] = clip
    return filled


def cut(frames: np.ndarray, crop: Crop, size: Sides, *, flip: bool) -> Tensor:
    """Frames F H W 3 -> clip F h w 3, contiguous; it may share memory with the frames."""
    clip = torch.from_numpy(frames).permute(0, 3, 1, 2)
    clip = F.resized_crop(clip, *crop, size=list(size), antialias=True)
    if flip:
        clip = F.horizontal_flip(clip)
    return clip.permute(0, 2, 3, 1).contiguous()


def _largest_box(height: int, width: int, size: Sides) -> tuple[float, float]:
    scale = min(height / size[0], width / size[1])
    return size[0] * scale, size[1] * scale
