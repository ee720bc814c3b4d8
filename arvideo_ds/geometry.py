"""From a clip to its token grid and its clusters; the only owner of divisibility.

    clip   T x H x W pixels
    cube   P_T x P_H x P_W pixels, one token          -> grid t x h x w, N tokens
    cluster K_T x K_H x K_W neighbouring tokens        -> C clusters of S tokens

Source: ARVideo (arXiv 2405.15160), section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from arvideo_ds.errors import UserError

Triple = tuple[int, int, int]
CHANNELS = 3
_AXES = ("frames", "height", "width")
# Whole, its settings, part and its setting, for errors.
_CUBE = ("clip", "data.frames and data.size", "cube", "model.patch")
_CLUSTER = ("token grid", "data.frames, data.size or model.patch", "cluster", "objective.cluster")


@dataclass(frozen=True)
class Geometry:
    """Shape of a clip, of its cubes (`patch`) and of its clusters (`cluster`, in tokens). Errors:
    `UserError` when a cube does not divide the clip or a cluster the token grid, with the axis,
    both numbers and their settings."""

    clip: Triple
    patch: Triple
    cluster: Triple

    def __post_init__(self) -> None:
        _require_division(self.clip, self.patch, *_CUBE)
        _require_division(self.grid, self.cluster, *_CLUSTER)

    @classmethod
    def whole(cls, clip: Triple, patch: Triple) -> Geometry:
        """The whole clip as one cluster."""
        return cls(clip, patch, cls(clip, patch, (1, 1, 1)).grid)

    @property
    def grid(self) -> Triple:
        """Tokens along time, height and width."""
        return _divide(self.clip, self.patch)

    @property
    def num_tokens(self) -> int:
        """N."""
        return math.prod(self.grid)

    @property
    def cube_pixels(self) -> int:
        """Pixel positions of a cube, without colour channels."""
        return math.prod(self.patch)

    @property
    def cube_values(self) -> int:
        """P, the values of one cube."""
        return self.cube_pixels * CHANNELS

    @property
    def cluster_grid(self) -> Triple:
        """Clusters along time, height and width."""
        return _divide(self.grid, self.cluster)

    @property
    def num_clusters(self) -> int:
        """C."""
        return math.prod(self.cluster_grid)

    @property
    def cluster_size(self) -> int:
        """S, tokens per cluster."""
        return math.prod(self.cluster)


def num_kept(share: float, size: int) -> int:
    """Number of tokens in a share of `size`: rounded half up, at least 1."""
    return max(1, math.floor(share * size + 0.5))


def _divide(whole: Triple, part: Triple) -> Triple:
    t, h, w = (a // b for a, b in zip(whole, part, strict=True))
    return t, h, w


def _require_division(
    whole: Triple, part: Triple, whole_name: str, whole_keys: str, part_name: str, part_key: str
) -> None:
    for axis, size, step in zip(_AXES, whole, part, strict=True):
        if size < 1 or step < 1:
            raise UserError(
                f"{whole_name} {_by(whole)} and {part_name} {_by(part)} must be positive on every "
                f"axis, but {axis} is {size} and {step}; change {whole_keys} or {part_key}."
            )
        if size % step:
            fits = [d for d in range(1, size + 1) if size % d == 0]
            raise UserError(
                f"the {part_name} {_by(part)} ({part_key}) does not divide the {whole_name} "
                f"{_by(whole)} ({whole_keys}): {axis} {size} is not a multiple of {step}. "
                f"The {part_name}'s {axis} may be one of {fits}; or change {whole_keys}."
            )


def _by(shape: Triple) -> str:
    return "x".join(str(n) for n in shape)
