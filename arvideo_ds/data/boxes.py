"""Boxes: crop, resize and flip with their frame; jitter; matching.

Boxes are n 4: x1 y1 x2 y2. In a frame they are shares of its sides (0..1, as in AVA), in a clip
pixels.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor
from torchvision.ops import box_area, box_iou, clip_boxes_to_image

from arvideo_ds.data.transforms import Crop, Sides

# A box with less height or width than this many pixels of the clip is not visible.
_LEAST_PIXELS = 1.0
# Minimum width and height of a jittered box, in pixels.
_LEAST_JITTERED = 2.0


def to_clip(boxes: np.ndarray, frame: Sides, crop: Crop, size: Sides, *, flip: bool) -> Tensor:
    """Boxes of a frame H W (shares) -> boxes of the clip h w that `cut` makes of it, n 4, float32;
    they may exceed the clip."""
    (height, width), (tall, wide) = frame, size
    pixels = torch.as_tensor(boxes, dtype=torch.float64).reshape(-1, 4)
    pixels = pixels * torch.tensor([width, height, width, height])
    pixels = pixels - torch.tensor([crop.left, crop.top, crop.left, crop.top])
    scale = wide / crop.width, tall / crop.height
    pixels = pixels * torch.tensor([*scale, *scale], dtype=torch.float64)
    if flip:
        left, top, right, bottom = pixels.unbind(dim=1)
        pixels = torch.stack([wide - right, top, wide - left, bottom], dim=1)
    return pixels.float()


def visible(boxes: Tensor, size: Sides) -> tuple[Tensor, Tensor]:
    """Boxes of a clip h w clipped to it, and the share of each area that remains."""
    inside = clip_boxes_to_image(boxes, size)
    return inside, box_area(inside) / box_area(boxes).clamp(min=1e-9)


def is_there(inside: Tensor) -> Tensor:
    """Which boxes of `visible` are more than a line: n, bool."""
    return (inside[:, 2:] - inside[:, :2] >= _LEAST_PIXELS).all(dim=1)


def jittered(
    boxes: Tensor, size: Sides, largest: tuple[float, float, float, float], generator: Generator
) -> Tensor:
    """Boxes of a clip h w, every side moved by a uniform share of the box, within the clip.
    largest: shares of the width outwards and inwards, then of the height. Source: VideoMAE's action
    detection (random_aug of alphaction/structures/bounding_box.py)."""
    (height, width), (wide_out, wide_in, tall_out, tall_in) = size, largest
    low = np.array([-wide_out, -tall_out, -wide_in, -tall_in])
    high = np.array([wide_in, tall_in, wide_out, tall_out])
    shares = torch.from_numpy(generator.uniform(low, high, (len(boxes), 4))).float()
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=_LEAST_PIXELS).repeat(1, 2)
    moved = boxes + shares * sides
    last = torch.tensor([width, height], dtype=torch.float32)
    corner = moved[:, :2].clamp(min=0).minimum(last - _LEAST_JITTERED)
    opposite = moved[:, 2:].minimum(last).maximum(corner + _LEAST_JITTERED)
    return torch.cat([corner, opposite], dim=1)


def extended(boxes: Tensor, size: Sides, by: tuple[float, float]) -> Tensor:
    """Boxes of a clip h w grown by shares of their width and height, half at each side, within the
    clip. Source: VideoMAE's action detection (test_ext of modeling_finetune.py)."""
    grown = (boxes[:, 2:] - boxes[:, :2]) * torch.tensor(by) / 2
    return clip_boxes_to_image(torch.cat([boxes[:, :2] - grown, boxes[:, 2:] + grown], 1), size)


def best_match(boxes: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each box, the index of the other with the largest IoU, and the IoU; n others > 0."""
    iou = box_iou(torch.as_tensor(boxes).reshape(-1, 4), torch.as_tensor(others).reshape(-1, 4))
    best = iou.max(dim=1)
    return np.asarray(best.indices), np.asarray(best.values)
