"""Fixed sine-cosine positions of tokens: tables N x width, float32."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from arvideo_ds.geometry import Triple


def position_table(scheme: str, grid: Triple, width: int) -> Tensor:
    """Table of `model.positions`; tokens count along (time, row, column) of the grid."""
    return {"sincos_1d": sincos_1d, "sincos_3d": sincos_3d}[scheme](grid, width)


def interpolated_positions(
    scheme: str, pretrained_grid: Triple, grid: Triple, width: int
) -> Tensor:
    """Table of `grid` interpolated from that of `pretrained_grid`: N x width.

    For clips of another shape: a recomputed table would give a place the row that another one had
    in pretraining. Bicubic over rows and columns, then linear over time, with cells' centres
    aligned. Equal grids give the plain table. Source: VideoMAE V2's fine-tuning, for other sizes
    and frame counts.
    """
    table = position_table(scheme, pretrained_grid, width)
    if grid == pretrained_grid:
        return table
    t, h, w = pretrained_grid
    table = rearrange(table, "(t h w) d -> t d h w", t=t, h=h, w=w)
    table = F.interpolate(table, size=grid[1:], mode="bicubic", align_corners=False)
    table = rearrange(table, "t d h w -> (h w) d t")
    table = F.interpolate(table, size=grid[0], mode="linear", align_corners=False)
    return rearrange(table, "(h w) d t -> (t h w) d", h=grid[1])


def sincos_1d(grid: Triple, width: int) -> Tensor:
    """Positions of the token's index in the flattened grid, frequencies from 1 to 1/10000.

    Even columns are sines, odd ones cosines. Source: VideoMAE (arXiv 2203.12602), official code.
    """
    number = torch.arange(grid[0] * grid[1] * grid[2], dtype=torch.float64)[:, None]
    column = torch.arange(width, dtype=torch.float64)
    angle = number / 10_000 ** (2 * (column // 2) / width)
    return torch.where(column % 2 == 0, angle.sin(), angle.cos()).float()


def sincos_3d(grid: Triple, width: int) -> Tensor:
    """Positions of time, row and column, a third of the columns each.

    Frequencies run from 1 to 1/(2 x length of the axis), so every column separates places, also on
    small grids (docs/demo.md).
    """
    share = width // 6 * 2
    shares = (width - 2 * share, share, share)
    places = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in grid))
    tables = []
    for axis, columns in enumerate(shares):
        steps = torch.linspace(0, 1, columns // 2, dtype=torch.float64)
        angle = places[:, axis, None] / (2 * grid[axis]) ** steps
        tables += [angle.sin(), angle.cos()]
    return torch.cat(tables, dim=1).float()
