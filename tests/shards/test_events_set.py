"""The long synthetic set: one event early, one late, and never both within 32 frames."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from arvideo_ds.shards.events_set import CLASSES, DURATION, EVENTS, FRAMES, SIDE, render

DEGREES = {"east": 0, "north_west": 120, "south_west": 240}


@pytest.mark.parametrize("number", range(12))
def test_no_clip_of_32_frames_sees_both_events(number: int) -> None:
    frames = render(number % 6, EVENTS.generator("train", number))
    assert frames.shape == (FRAMES, SIDE, SIDE, 3) and frames.dtype == np.uint8
    changes = np.flatnonzero((frames[1:] != frames[:-1]).any(axis=(1, 2, 3)))
    gaps = np.flatnonzero(np.diff(changes) > 1)
    assert len(gaps) == 1
    end, start = changes[gaps[0]], changes[gaps[0] + 1]
    assert start - end > 32
    assert end - changes[0] <= DURATION and changes[-1] - start <= DURATION


@pytest.mark.parametrize("kind", range(6))
def test_the_class_says_where_each_shape_went(kind: int) -> None:
    first, second = list(itertools.permutations(DEGREES, 2))[kind]
    assert CLASSES[kind] == f"{first}_{second}"
    frames = render(kind, np.random.default_rng(kind))
    background = np.median(frames, axis=0)
    for part, name in ((frames[:64], first), (frames[64:], second)):
        shapes = [np.argwhere((f != background).any(axis=-1)) for f in part]
        centres = [shape.mean(axis=0) for shape in shapes if len(shape)]
        down, right = centres[-4] - centres[3]
        away = np.degrees(np.arctan2(-down, right)) - DEGREES[name]
        assert abs((away + 180) % 360 - 180) < 25
