"""Boxes go where the pixels go: crop, resize and flip of a frame and of what is marked in it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from arvideo_ds.data.boxes import best_match, is_there, to_clip, visible
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
