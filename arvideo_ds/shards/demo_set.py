"""The demo set: only the motion determines the class.

A shape of random form, colour, size and speed drifts past the middle in one of eight directions, in
front of a still background of blended colours.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from arvideo_ds.shards.synthetic import Drift, SyntheticSet, background

DIRECTIONS = (
    "east", "north_east", "north", "north_west", "west", "south_west", "south", "south_east",
)  # fmt: skip
SIDE, FRAMES = 40, 12
_DRIFT = Drift(speeds=(1.5, 2.4), radii=(5.0, 8.0), aside=5.0)


def scene(split: str, number: int) -> tuple[np.ndarray, np.ndarray]:
    """`render_scene` of a video of the set: its frames before encoding, and its shape."""
    return render_scene(number % len(DIRECTIONS), DEMO.generator(split, number))


def render(direction: int, generator: np.random.Generator) -> np.ndarray:
    """One video, uint8, FRAMES x SIDE x SIDE x 3; y grows downwards, so north is up."""
    return render_scene(direction, generator)[0]


def render_scene(direction: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The frames of `render`, and the shape's share of each pixel: F x S x S x 1, 0..1."""
    frames = np.repeat(background(generator, SIDE)[None], FRAMES, axis=0)
    covers = _DRIFT.draw(frames, math.tau * direction / len(DIRECTIONS), generator)
    return frames.round().astype(np.uint8), covers


DEMO = SyntheticSet(
    name="demo",
    splits={"train": 2400, "test": 800},
    classes=DIRECTIONS,
    rate=Fraction(12),
    draw=render,
)
