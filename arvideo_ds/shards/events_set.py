"""Long videos: the class is the order of two events, more than 32 frames apart.

In front of a still background a shape crosses the picture early, in one of three directions, and
another shape late, in another direction; the ordered pair is one of 6 classes. A model of 32 frames
sees at most one event, a model without order only the two directions: each is right in 1 of 2
videos at best.
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np

from arvideo_ds.shards.synthetic import Drift, SyntheticSet, background

SIDE, FRAMES = 32, 128
# Degrees; frames of an event; first and last frame at which the two events may start.
_DIRECTIONS = {"east": 0, "north_west": 120, "south_west": 240}
DURATION, _FIRST, _SECOND = 28, (0, 4), (96, 100)
CLASSES = tuple(f"{a}_{b}" for a, b in itertools.permutations(_DIRECTIONS, 2))
_DRIFT = Drift(speeds=(0.7, 1.1), radii=(4.0, 6.5), aside=4.0)


def render(kind: int, generator: np.random.Generator) -> np.ndarray:
    """One video, uint8, FRAMES x SIDE x SIDE x 3; y grows downwards, so north is up."""
    frames = np.repeat(background(generator, SIDE)[None], FRAMES, axis=0)
    angles = list(itertools.permutations(_DIRECTIONS.values(), 2))[kind]
    for angle, starts in zip(angles, (_FIRST, _SECOND), strict=True):
        start = int(generator.integers(starts[0], starts[1] + 1))
        _DRIFT.draw(frames[start : start + DURATION], math.radians(angle), generator)
    return frames.round().astype(np.uint8)


EVENTS = SyntheticSet(
    name="events",
    splits={"train": 1200, "test": 600},
    classes=CLASSES,
    rate=Fraction(16),
    draw=render,
)
