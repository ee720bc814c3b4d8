"""Boxes: what becomes of them when their frame is cropped, resized and flipped, and how they match.

Boxes are n 4: x1 y1 x2 y2. Within a frame they are shares of its sides (0..1, as AVA has them),
within a clip they are its pixels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou, clip_boxes_to_image

from arvideo_ds.data.transforms import Crop

# A box of which less than this many pixels of the clip are left, in height or width, is gone.
_LEAST_PIXELS = 1.0
# Least width and height of a jittered box, in pixels.
_LEAST_JITTERED = 2.0


def to_clip(
    boxes: np.ndarray, frame: tuple[int, int], crop: Crop, size: tuple[int, int], *, flip: bool
) -> Tensor:
    """Boxes of a frame H W (shares) -> the same in the clip that `cut` makes of it: n 4, float32.

    They may reach beyond the clip: `visible` cuts them off.
    """
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


def visible(boxes: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Boxes of a clip h w cut off at its sides, and of each the share of its area that is left."""
    inside = clip_boxes_to_image(boxes, size)
    return inside, _area(inside) / _area(boxes).clamp(min=1e-9)


def is_there(inside: Tensor) -> Tensor:
    """Which of the boxes that `visible` cut off are more than a line: n, bool."""
    return (inside[:, 2:] - inside[:, :2] >= _LEAST_PIXELS).all(dim=1)


def jittered(
    boxes: Tensor,
    size: tuple[int, int],
    largest: tuple[float, float, float, float],
    generator: np.random.Generator,
) -> Tensor:
    """Boxes of a clip h w, every side moved by a uniform share of the box; they stay inside.

    largest: shares of the width outwards and inwards, then of the height. A box keeps at least two
    pixels of width and height. Source: VideoMAE's action detection (random_aug of
    alphaction/structures/bounding_box.py).
    """
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


def extended(boxes: Tensor, size: tuple[int, int], by: tuple[float, float]) -> Tensor:
    """Boxes of a clip h w grown by shares of their width and height, half at each side; cut off
    at the clip's sides. Source: VideoMAE's action detection (test_ext of modeling_finetune.py)."""
    grown = (boxes[:, 2:] - boxes[:, :2]) * torch.tensor(by) / 2
    return clip_boxes_to_image(torch.cat([boxes[:, :2] - grown, boxes[:, 2:] + grown], 1), size)


def best_match(boxes: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each box the place of the other that it overlaps most, and their IoU; there are others."""
    iou = box_iou(torch.as_tensor(boxes).reshape(-1, 4), torch.as_tensor(others).reshape(-1, 4))
    best = iou.max(dim=1)
    return np.asarray(best.indices), np.asarray(best.values)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(dim=1)
