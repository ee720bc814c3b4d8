"""Long videos in which the class is the order of two events, more than 32 frames apart.

Before a still background a shape crosses the picture early on, in one of three directions, and
another one late, in another direction. Both directions are the class: 6 of them. Whoever sees
32 frames sees one event at most, and guesses the other: 1 in 2 at best. Who sees all frames
and not their order knows which two directions there were: 1 in 2 again.
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np

from arvideo_ds.shards.synthetic import Drift, SyntheticSet, background

SIDE, FRAMES = 32, 128
# Degrees; an event's frames; the first frames at which the first and the second event may start.
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
