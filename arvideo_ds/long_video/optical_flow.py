"""Classical optical flow: pyramidal Lucas-Kanade, dense, in plain tensor operations.

Coarse to fine: at each level of the pyramid the second image is warped by the flow so far, and the
remaining motion is the least-squares solution in a window around each pixel. A small penalty on its
length keeps flat regions at rest.

Source: Lucas and Kanade 1981; pyramid, and gradients of the first image only, after Bouguet 2001.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

LEVELS, ITERATIONS, RADIUS = 4, 3, 3
# The penalty, in squared grey levels of 0..1 per pixel.
_PENALTY = 1e-4
# The smallest side of a level, and the longest step of an iteration, in pixels.
_LEAST_SIDE, _LONGEST_STEP = 16, 2.0


def optical_flow(first: Tensor, second: Tensor) -> Tensor:
    """Motion of every pixel from `first` to `second`: M 2 H W (x right, y down), in pixels.

    first and second: M H W, grey 0..1, float32.
    """
    pyramid = [(first[:, None], second[:, None])]
    while len(pyramid) < LEVELS and min(pyramid[-1][0].shape[-2:]) >= 2 * _LEAST_SIDE:
        one, other = pyramid[-1]
        pyramid.append((F.avg_pool2d(one, 2), F.avg_pool2d(other, 2)))
    flow = first.new_zeros(len(first), 2, *pyramid[-1][0].shape[-2:])
    for one, other in reversed(pyramid):
        flow = _refined(_finer(flow, one.shape[-2:]), one, other)
    return flow


def _finer(flow: Tensor, sides: torch.Size) -> Tensor:
    """The flow resized to a level of these sides, in its pixels."""
    height, width = flow.shape[-2:]
    scale = flow.new_tensor([sides[1] / width, sides[0] / height])[:, None, None]
    return scale * F.interpolate(flow, tuple(sides), mode="bilinear", align_corners=False)


def _refined(flow: Tensor, first: Tensor, second: Tensor) -> Tensor:
    padded = F.pad(first, (1, 1, 1, 1), mode="replicate")
    dx = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    dy = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    xx, xy, yy = _mean(dx * dx) + _PENALTY, _mean(dx * dy), _mean(dy * dy) + _PENALTY
    determinant = xx * yy - xy * xy
    for _ in range(ITERATIONS):
        difference = first - _warped(second, flow)
        x, y = _mean(dx * difference), _mean(dy * difference)
        step = torch.cat([yy * x - xy * y, xx * y - xy * x], dim=1) / determinant
        flow = flow + step.clamp(-_LONGEST_STEP, _LONGEST_STEP)
    return flow


def _mean(values: Tensor) -> Tensor:
    """Mean over the part of the window around each pixel that is inside the image."""
    side = 2 * RADIUS + 1
    return F.avg_pool2d(values, side, stride=1, padding=RADIUS, count_include_pad=False)


def _warped(images: Tensor, flow: Tensor) -> Tensor:
    """The images sampled at each pixel + flow; outside, the value at the border."""
    height, width = flow.shape[-2:]
    x = torch.arange(width, device=flow.device) + 0.5 + flow[:, 0]
    y = torch.arange(height, device=flow.device)[:, None] + 0.5 + flow[:, 1]
    grid = torch.stack([2 * x / width - 1, 2 * y / height - 1], dim=-1)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
