"""Boxes go where the pixels go: crop, resize and flip of a frame and of what is marked in it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from arvideo_ds.data.boxes import best_match, extended, is_there, jittered, to_clip, visible
from arvideo_ds.data.transforms import Crop, cut, multi_scale_crop, random_resized_crop

HEIGHT, WIDTH, SIZE = 90, 160, (64, 48)
SIDES = np.array([WIDTH, HEIGHT, WIDTH, HEIGHT])


def painted(box: np.ndarray) -> np.ndarray:
    """One white box (pixels) on black, 1 H W 3."""
    left, top, right, bottom = box
    frame = np.zeros((1, HEIGHT, WIDTH, 3), dtype=np.uint8)
    frame[:, top:bottom, left:right] = 255
    return frame


@pytest.mark.parametrize("seed", range(25))
def test_a_painted_box_lies_where_its_coordinates_say(seed: int) -> None:
    generator = np.random.default_rng(seed)
    left, top = generator.integers(0, (WIDTH - 30, HEIGHT - 30))
    box = np.array([left, top, left + generator.integers(20, 60), top + generator.integers(20, 60)])
    box = box.clip(0, SIDES)
    if seed % 2:
        crop = multi_scale_crop(HEIGHT, WIDTH, SIZE, (1.0, 0.875, 0.75), generator)
    else:
        crop = random_resized_crop(HEIGHT, WIDTH, (0.2, 1.0), generator)
    flip = bool(generator.integers(2))
    clip = cut(painted(box), crop, SIZE, flip=flip)[0, ..., 0] > 127
    inside, share = visible(to_clip(box / SIDES, (HEIGHT, WIDTH), crop, SIZE, flip=flip), SIZE)
    assert bool(share > 0.02) == bool(clip.any())
    if clip.any():
        rows, columns = clip.any(1).nonzero(), clip.any(0).nonzero()
        seen = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
        torch.testing.assert_close(inside[0], seen, atol=1.0, rtol=0)


def test_the_whole_frame_changes_nothing_and_two_flips_neither() -> None:
    boxes = np.array([[0.1, 0.2, 0.5, 0.9], [0.0, 0.0, 1.0, 1.0]])
    whole, size = Crop(0, 0, HEIGHT, WIDTH), (HEIGHT, WIDTH)
    plain = to_clip(boxes, size, whole, size, flip=False)
    torch.testing.assert_close(plain, torch.tensor(boxes * SIDES).float())
    flipped = to_clip(boxes, size, whole, size, flip=True).numpy() / SIDES
    torch.testing.assert_close(to_clip(flipped, size, whole, size, flip=True), plain)
    assert (plain[:, 2:] > plain[:, :2]).all()


def test_what_is_visible_of_a_box_is_its_share_of_the_area() -> None:
    boxes = torch.tensor([[0, 0, 10, 10], [-10, 0, 10, 10], [-10, -10, 10, 10], [70, 0, 80, 9.0]])
    inside, share = visible(boxes, (64, 48))
    torch.testing.assert_close(share, torch.tensor([1, 0.5, 0.25, 0]))
    assert is_there(inside).tolist() == [True, True, True, False]


def test_no_boxes_are_boxes_too() -> None:
    crop = Crop(0, 0, HEIGHT, WIDTH)
    none = to_clip(np.zeros((0, 4)), (HEIGHT, WIDTH), crop, SIZE, flip=True)
    inside, share = visible(none, SIZE)
    assert (none.shape, inside.shape, share.shape) == ((0, 4), (0, 4), (0,))


def test_the_best_match_is_the_largest_overlap() -> None:
    boxes = np.array([[0, 0, 1, 1], [0, 0, 0.5, 1]])
    others = np.array([[0.5, 0, 1, 1], [0, 0, 0.6, 1]])
    best, iou = best_match(boxes, others)
    assert best.tolist() == [1, 1]
    np.testing.assert_allclose(iou, [0.6, 0.5 / 0.6])


JITTER = (0.2, 0.1, 0.1, 0.05)


def random_boxes(seed: int, count: int = 40) -> torch.Tensor:
    """Boxes within a clip of SIZE, down to lines on its edge."""
    generator = np.random.default_rng(seed)
    corners = generator.uniform(0, (SIZE[1], SIZE[0]) * 2, (count, 4)).reshape(count, 2, 2)
    boxes = np.concatenate([corners.min(1), corners.max(1)], axis=1)
    boxes[0], boxes[1] = (0, 5, 0, 20), (SIZE[1], 0, SIZE[1], SIZE[0])
    return torch.tensor(boxes).float()


@pytest.mark.parametrize("seed", range(4))
def test_jittered_boxes_are_those_of_the_rule_written_down_as_loops(seed: int) -> None:
    boxes, (height, width) = random_boxes(seed), SIZE
    moved = jittered(boxes, SIZE, JITTER, np.random.default_rng(seed))
    wide_out, wide_in, tall_out, tall_in = JITTER
    draws = np.random.default_rng(seed).random((len(boxes), 4))
    for (left, top, right, bottom), draw, own in zip(boxes.tolist(), draws, moved, strict=True):
        wide, tall = max(right - left, 1), max(bottom - top, 1)
        x1 = min(max(left + wide * (-wide_out + draw[0] * (wide_in + wide_out)), 0), width - 2)
        y1 = min(max(top + tall * (-tall_out + draw[1] * (tall_in + tall_out)), 0), height - 2)
        x2 = right + wide * (-wide_in + draw[2] * (wide_out + wide_in))
        y2 = bottom + tall * (-tall_in + draw[3] * (tall_out + tall_in))
        expected = [x1, y1, max(min(x2, width), x1 + 2), max(min(y2, height), y1 + 2)]
        np.testing.assert_allclose(own.numpy(), expected, atol=1e-4)


def test_jittered_boxes_stay_inside_and_are_at_least_two_pixels() -> None:
    moved = torch.cat(
        [jittered(random_boxes(s), SIZE, (1.0,) * 4, np.random.default_rng(s)) for s in range(20)]
    )
    assert moved.min() >= 0
    assert (moved[:, 2:] <= torch.tensor([SIZE[1], SIZE[0]])).all()
    assert (moved[:, 2:] - moved[:, :2] >= 2 - 1e-5).all()


def test_boxes_are_extended_by_half_of_the_share_at_each_side() -> None:
    boxes = torch.tensor([[10.0, 20, 30, 60], [0, 0, 48, 64]])
    grown = extended(boxes, SIZE, (0.1, 0.05))
    torch.testing.assert_close(grown[0], torch.tensor([9.0, 19, 31, 61]))
    torch.testing.assert_close(grown[1], boxes[1])  # the clip ends there
    torch.testing.assert_close(extended(boxes, SIZE, (0.0, 0.0)), boxes)
