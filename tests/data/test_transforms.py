"""Crop, resize and flip: inside the frame, of the right shape, place and orientation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from arvideo_ds.data.transforms import (
    Crop,
    cut,
    fill_up,
    fit_to_grid,
    grid_crop,
    multi_scale_crop,
    short_side_crop,
    view_crop,
    whole_frame,
)

SIDES, CLIP_SIDES = st.integers(2, 700), st.integers(8, 256)
SCALES = st.lists(st.floats(0.05, 1.0), min_size=1, max_size=5)
NO_SCALING = [1.0]


def inside(crop: Crop, height: int, width: int) -> bool:
    return (
        crop.height >= 1
        and crop.width >= 1
        and 0 <= crop.top <= height - crop.height
        and 0 <= crop.left <= width - crop.width
    )


@given(SIDES, SIDES, CLIP_SIDES, CLIP_SIDES, SCALES, st.integers(0, 50))
@example(200, 2, 8, 256, NO_SCALING, 0)
def test_crops_lie_within_the_frame(
    height: int, width: int, clip_height: int, clip_width: int, scales: list[float], seed: int
) -> None:
    size = (clip_height, clip_width)
    generator = np.random.default_rng(seed)
    assert inside(multi_scale_crop(height, width, size, scales, generator), height, width)
    assert inside(view_crop(height, width, size), height, width)


@given(st.integers(64, 700), st.integers(64, 700), st.integers(0, 50))
def test_scales_of_height_and_width_differ_by_at_most_one_step(
    height: int, width: int, seed: int
) -> None:
    scales, size = [1.0, 0.875, 0.75, 0.66], (224, 112)
    crop = multi_scale_crop(height, width, size, scales, np.random.default_rng(seed))
    box = min(height / size[0], width / size[1])
    steps = [
        int(np.argmin([abs(side / (whole * box) - scale) for scale in scales]))
        for side, whole in ((crop.height, size[0]), (crop.width, size[1]))
    ]
    assert abs(steps[0] - steps[1]) <= 1


def test_random_crops_reach_all_corners_the_middle_and_every_scale() -> None:
    generator = np.random.default_rng(0)
    crops = [multi_scale_crop(100, 140, (50, 50), [1.0, 0.5], generator) for _ in range(400)]
    smallest = {(c.top, c.left) for c in crops if (c.height, c.width) == (50, 50)}
    assert {(0, 0), (0, 90), (50, 0), (50, 90), (25, 45)} <= smallest
    assert {(c.height, c.width) for c in crops} == {(100, 100), (100, 50), (50, 100), (50, 50)}


@given(SIDES, SIDES, st.integers(8, 256), st.integers(8, 256))
def test_the_central_crop_is_central_largest_and_of_the_clips_aspect(
    height: int, width: int, clip_height: int, clip_width: int
) -> None:
    crop = view_crop(height, width, (clip_height, clip_width))
    assert abs(2 * crop.top + crop.height - height) <= 1
    assert abs(2 * crop.left + crop.width - width) <= 1
    assert crop.height == height or crop.width == width
    # Within the rounding of one pixel on either side.
    assert abs(crop.height * clip_width - crop.width * clip_height) <= max(clip_height, clip_width)


@pytest.mark.parametrize("size", [(32, 32), (16, 48), (48, 16), (64, 80)])
@pytest.mark.parametrize("flip", [False, True])
def test_clips_have_the_asked_shape_and_own_their_memory(size: tuple[int, int], flip: bool) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (5, 40, 60, 3), dtype=np.uint8)
    clip = cut(frames, view_crop(40, 60, size), size, flip=flip)
    assert clip.shape == (5, *size, 3)
    assert clip.dtype == torch.uint8
    assert clip.is_contiguous()
    assert clip.untyped_storage().nbytes() == clip.numel()


def test_a_crop_of_the_clips_own_size_is_those_very_pixels() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 40, 60, 3), dtype=np.uint8)
    before = frames.copy()
    clip = cut(frames, Crop(top=3, left=7, height=20, width=30), (20, 30), flip=False)
    assert np.array_equal(clip.numpy(), frames[:, 3:23, 7:37])
    clip.zero_()
    assert np.array_equal(frames, before)


def test_a_flipped_clip_is_the_mirror_image() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 40, 60, 3), dtype=np.uint8)
    crop = Crop(top=2, left=11, height=31, width=33)
    plain, mirrored = (cut(frames, crop, (24, 26), flip=flip) for flip in (False, True))
    assert torch.equal(mirrored, plain.flip(2))
    assert not torch.equal(mirrored, plain)


@pytest.mark.parametrize(("height", "width"), [(40, 90), (90, 40), (50, 50)])
def test_spatial_views_run_from_one_end_of_the_free_side_to_the_other(
    height: int, width: int
) -> None:
    crops = [view_crop(height, width, (32, 32), view, 3) for view in range(3)]
    assert (crops[0].top, crops[0].left) == (0, 0)
    assert crops[1] == view_crop(height, width, (32, 32))
    assert crops[2].top + crops[2].height == height
    assert crops[2].left + crops[2].width == width


@pytest.mark.parametrize(("height", "width"), [(512, 768), (768, 512)])
def test_views_of_a_larger_short_side_are_of_the_clips_size_and_move_along_the_longer_side(
    height: int, width: int
) -> None:
    """A frame resized to a shorter side of 256 pixels, of which clips of 224 are cut."""
    crops = [view_crop(height, width, (224, 224), view, 3, short_side=256) for view in range(3)]
    assert {(crop.height, crop.width) for crop in crops} == {(448, 448)}
    along, across = (0, 1) if height > width else (1, 0)
    assert [crop[along] for crop in crops] == [0, 160, 320]
    assert {crop[across] for crop in crops} == {32}


@given(st.integers(2, 80), st.integers(2, 80), st.sampled_from([(8, 8), (16, 8), (8, 24)]))
def test_frames_fitted_to_the_grid_hold_the_clip_and_are_whole_tokens(
    height: int, width: int, size: tuple[int, int]
) -> None:
    frames = np.zeros((1, height, width, 3), np.uint8)
    _, rows, columns, _ = fit_to_grid(frames, size, (8, 8)).shape
    assert rows >= size[0]
    assert columns >= size[1]
    assert size[0] == rows or size[1] == columns
    assert rows % 8 == columns % 8 == 0
    # The other side is the aspect's, less than a token shorter.
    scale = max(size[0] / height, size[1] / width)
    assert -8.5 <= rows - scale * height <= 0.5 + 1e-9
    assert -8.5 <= columns - scale * width <= 0.5 + 1e-9


def test_fitting_to_the_grid_keeps_the_middle() -> None:
    frames = np.zeros((1, 16, 46, 3), np.uint8)
    frames[:, :, :3], frames[:, :, -3:], frames[:, :, 3:43] = 1, 2, 3
    assert (fit_to_grid(frames, (16, 16), (8, 8)) == 3).all()


def test_grid_crops_are_cut_at_tokens_reach_all_places_and_are_not_resized() -> None:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (2, 16, 40, 3), dtype=np.uint8)
    frames = fit_to_grid(pixels, (16, 16), (8, 8))
    assert np.array_equal(frames, pixels)
    places = []
    for _ in range(200):
        crop = grid_crop(16, 40, (16, 16), (8, 8), generator)
        places.append((crop.top, crop.left))
        clip = cut(frames, crop, (16, 16), flip=False)
        assert np.array_equal(clip.numpy(), frames[:, :16, crop.left : crop.left + 16])
    assert {place: places.count(place) > 30 for place in set(places)} == {
        (0, 0): True, (0, 8): True, (0, 16): True, (0, 24): True,
    }  # fmt: skip


@given(st.integers(2, 700), st.integers(2, 700), st.integers(0, 50))
@example(48, 80, 0)
def test_a_crop_of_the_short_side_has_the_frames_scale_and_lies_inside(
    height: int, width: int, seed: int
) -> None:
    crop = short_side_crop(height, width, (224, 192), 256, np.random.default_rng(seed))
    assert inside(crop, height, width)
    scale = min(height, width) / 256
    assert abs(crop.height - 224 * scale) <= 1
    assert abs(crop.width - 192 * scale) <= 1


def test_crops_of_the_short_side_reach_every_place() -> None:
    generator = np.random.default_rng(0)
    crops = [short_side_crop(16, 24, (14, 14), 16, generator) for _ in range(400)]
    assert {(crop.top, crop.left) for crop in crops} == {
        (t, c) for t in range(3) for c in range(11)
    }


@given(st.integers(60, 700), st.integers(60, 700))
@example(720, 1280)
def test_whole_frames_keep_their_aspect_and_miss_less_than_a_token(height: int, width: int) -> None:
    (rows, columns), missing = whole_frame(height, width, 256, (16, 16))
    assert min(rows, columns) == 256
    assert abs(columns / rows - width / height) < width / height / 100
    assert all(0 <= m < 16 for m in missing)
    assert (rows + missing[0]) % 16 == (columns + missing[1]) % 16 == 0
    if (height, width) == (720, 1280):
        assert (rows, columns, missing) == (256, 455, (0, 9))


def test_what_is_filled_up_is_nothing_to_the_encoder() -> None:
    clip = torch.full((2, 8, 6, 3), 200, dtype=torch.uint8)
    filled = fill_up(clip, (4, 2))
    assert filled.shape == (2, 12, 8, 3)
    assert (filled[:, :8, :6] == 200).all()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for part in (filled[:, 8:], filled[:, :, 6:]):
        assert ((part / 255 - mean) / std).abs().max() < 0.01
