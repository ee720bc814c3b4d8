"""Fixed positions of the tokens: N x width tables, float32, of sines and cosines."""

from __future__ import annotations

import torch
from torch import Tensor

from arvideo_ds.geometry import Triple


def position_table(scheme: str, grid: Triple, width: int) -> Tensor:
    """Table of `model.positions`; tokens count along (time, row, column) of the grid."""
    return {"sincos_1d": sincos_1d, "sincos_3d": sincos_3d}[scheme](grid, width)


def sincos_1d(grid: Triple, width: int) -> Tensor:
    """Of the token's number in the flattened grid, frequencies from 1 to 1/10000.

    Even columns are sines, odd ones cosines. The table of VideoMAE, so encoder weights load both
    ways. Source: VideoMAE (arXiv 2203.12602), official code.
    """
    number = torch.arange(grid[0] * grid[1] * grid[2], dtype=torch.float64)[:, None]
    column = torch.arange(width, dtype=torch.float64)
    angle = number / 10_000 ** (2 * (column // 2) / width)
    return torch.where(column % 2 == 0, angle.sin(), angle.cos()).float()


def sincos_3d(grid: Triple, width: int) -> Tensor:
    """Of time, row and column apart, a third of the columns each.

    Frequencies run from 1 to 1/(2 x length of the axis), so every column tells places apart. On
    small grids this is what lets attention find "same place, other time": see docs/demo.md.
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
