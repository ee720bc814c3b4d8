"""What the tokenizer's forward pass costs: every convolution, counted as planning/cost.py counts.

A test holds these against the real modules.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from arvideo_ds.config.tokenizer import (
    TokenizerSettings,
    halvings,
    scorer_kernel,
    scorer_strides,
)
from arvideo_ds.geometry import CHANNELS, Geometry

# Three along every axis.
_CUBE = 27


@dataclass(frozen=True)
class Convolution:
    """kernel: its positions. voxels: of the output. normed: a group norm stands before it."""

    kernel: int
    inputs: int
    outputs: int
    voxels: int
    normed: bool = False

    @property
    def parameters(self) -> int:
        norm = 2 * self.inputs if self.normed else 0
        return (self.kernel * self.inputs + 1) * self.outputs + norm

    @property
    def flops(self) -> int:
        return 2 * self.voxels * self.kernel * self.inputs * self.outputs


def convolutions(
    settings: TokenizerSettings, geometry: Geometry
) -> tuple[list[Convolution], list[Convolution]]:
    """Those of encoder and scorer, and those of the decoder, on one clip; without the losses'."""
    encoder = [*_encoder(settings, geometry), *_scorer(settings.filters, geometry)]
    return encoder, list(_decoder(settings, geometry))


def _levels(settings: TokenizerSettings, geometry: Geometry) -> list[tuple[int, int]]:
    """Channels and voxels at each resolution, the clip's own first."""
    voxels = [math.prod(geometry.clip)]
    for stride in halvings(geometry.patch):
        voxels.append(voxels[-1] // math.prod(stride))
    widths = [settings.filters * multiplier for multiplier in settings.multipliers]
    return list(zip(widths, voxels, strict=True))


def _encoder(settings: TokenizerSettings, geometry: Geometry) -> Iterator[Convolution]:
    levels = _levels(settings, geometry)
    before, size = levels[0]
    yield Convolution(_CUBE, CHANNELS, before, size)
    for width, size in [*levels, levels[-1]]:
        yield from _residuals([before, *settings.blocks * [width]], size)
        before = width
    yield Convolution(1, before, len(settings.levels), size, normed=True)


def _decoder(settings: TokenizerSettings, geometry: Geometry) -> Iterator[Convolution]:
    levels = _levels(settings, geometry)
    before, size = levels[-1]
    yield Convolution(_CUBE, len(settings.levels), before, size)
    yield from _residuals([before, *settings.blocks * [before]], size)
    for level, (width, size) in reversed(list(enumerate(levels))):
        yield from _residuals([before, *settings.blocks * [width]], size)
        if level:
            yield Convolution(_CUBE, width, width, levels[level - 1][1])
        before = width
    yield Convolution(_CUBE, before, CHANNELS, size, normed=True)


def _residuals(widths: list[int], voxels: int) -> Iterator[Convolution]:
    for inputs, outputs in itertools.pairwise(widths):
        yield Convolution(_CUBE, inputs, outputs, voxels, normed=True)
        yield Convolution(_CUBE, outputs, outputs, voxels, normed=True)
        if inputs != outputs:
            yield Convolution(1, inputs, outputs, voxels)


def _scorer(filters: int, geometry: Geometry) -> Iterator[Convolution]:
    voxels, inputs = math.prod(geometry.clip), CHANNELS
    for stride in scorer_strides(geometry.patch):
        voxels //= math.prod(stride)
        yield Convolution(math.prod(scorer_kernel(stride)), inputs, filters, voxels)
        inputs = filters
