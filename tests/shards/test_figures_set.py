"""The synthetic figures: they move before a still background, and the class says where to."""

from __future__ import annotations

import numpy as np
import pytest

from arvideo_ds.shards.figures_set import FIGURES, FRAMES, HEIGHT, TRAVEL, WIDTH, line, render

SEEDS = range(12)


def videos(kind: int) -> np.ndarray:
    frames = np.stack([render(kind, np.random.default_rng(seed)) for seed in SEEDS])
    assert frames.shape == (len(SEEDS), FRAMES, HEIGHT, WIDTH, 3) and frames.dtype == np.uint8
    return frames.astype(np.float32)


@pytest.mark.parametrize("kind", range(len(TRAVEL)))
def test_figures_move_before_a_still_background(kind: int) -> None:
    change = videos(kind).std(axis=1).max(-1)
    moving, still = ((change > 15).mean((1, 2)), (change < 8).mean((1, 2)))
    # A few figures have stiff limbs and stay where they are.
    assert (moving > 0.01).mean() > 0.8
    assert np.median(moving) < 0.5
    assert np.median(still) > 0.4


def test_the_class_says_where_the_figures_travel() -> None:
    columns, ways = np.arange(WIDTH), []
    for kind in range(len(TRAVEL)):
        frames = videos(kind)
        away = np.abs(frames - np.median(frames, axis=1, keepdims=True)).max(-1)
        weights = np.where(away > 25, away, 0).sum(2) + 1e-3  # video, frame, column
        middles = (weights * columns).sum(-1) / weights.sum(-1)
        ways.append(np.median(middles[:, -10:].mean(1) - middles[:, :10].mean(1)))
    assert FIGURES.classes == ("left", "nowhere", "right")
    assert ways[0] < -4 and abs(ways[1]) < 2 and ways[2] > 4


def test_a_video_is_a_function_of_its_number() -> None:
    first, again, other = (render(0, FIGURES.generator("train", n)) for n in (4, 4, 5))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_line_covers_its_length_and_width() -> None:
    covers = line(np.array([10.0, 20.0]), np.array([30.0, 20.0]), 3.0)
    assert covers.sum() == pytest.approx(20 * 6 + np.pi * 9, rel=0.02)
    assert covers[19, 20] == 1 and covers[30, 20] == 0
