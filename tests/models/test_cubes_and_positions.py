"""Cubes, targets and position tables."""

from __future__ import annotations

import pytest
import torch

from arvideo_ds.models.cubes import from_cubes, pick, pixel_targets, standardize, to_cubes
from arvideo_ds.models.positions import interpolated_positions, position_table

CLIP, PATCH, GRID = (2, 4, 6, 8, 3), (2, 3, 4), (2, 2, 2)


def random_clips() -> torch.Tensor:
    return torch.randint(0, 256, CLIP, dtype=torch.uint8)


def test_cubes_round_trip() -> None:
    clips = random_clips()
    assert torch.equal(from_cubes(to_cubes(clips, PATCH), PATCH, GRID), clips)


def test_a_cube_holds_the_pixels_of_its_place() -> None:
    clips = random_clips()
    cube = to_cubes(clips, PATCH)[1, 5]  # token 5 of grid 2x2x2 is (1, 0, 1)
    assert torch.equal(cube, clips[1, 2:4, 0:3, 4:8].flatten())


def test_picked_cubes_are_those_asked_for() -> None:
    cubes = to_cubes(random_clips(), PATCH)
    tokens = torch.tensor([[3, 0], [7, 3]])
    assert torch.equal(pick(cubes, tokens)[1, 0], cubes[1, 7])


def test_normalized_targets_have_mean_zero_and_unbiased_variance_one_per_channel() -> None:
    targets = pixel_targets(to_cubes(random_clips(), PATCH), normalize=True)
    pixels = targets.view(2, 8, -1, 3)
    assert torch.allclose(pixels.mean(2), torch.zeros(2, 8, 3), atol=1e-5)
    assert torch.allclose(pixels.var(2, unbiased=True), torch.ones(2, 8, 3), atol=1e-4)


def test_raw_targets_are_pixels_of_zero_to_one() -> None:
    cubes = to_cubes(random_clips(), PATCH)
    assert torch.allclose(pixel_targets(cubes, normalize=False) * 255, cubes.float())


def test_bytes_and_unit_floats_mean_the_same() -> None:
    cubes = to_cubes(random_clips(), PATCH)
    assert torch.allclose(standardize(cubes), standardize(cubes.float() / 255))


@pytest.mark.parametrize("scheme", ["sincos_1d", "sincos_3d"])
def test_every_place_has_a_position_of_its_own(scheme: str) -> None:
    table = position_table(scheme, (3, 4, 5), 96)
    assert table.shape == (60, 96)
    assert table.abs().max() <= 1
    distances = torch.cdist(table, table) + 10 * torch.eye(60)
    assert distances.min() > 0.1


def test_the_3d_table_keeps_the_axes_apart() -> None:
    table = position_table("sincos_3d", (3, 4, 5), 96).view(3, 4, 5, 96)
    assert torch.equal(table[0, 1, 2, 32:], table[2, 1, 2, 32:])  # another time, same place
    assert torch.equal(table[1, 0, 2, :32], table[1, 3, 4, :32])  # another place, same time


@pytest.mark.parametrize("scheme", ["sincos_1d", "sincos_3d"])
def test_interpolated_positions_of_the_same_grid_are_the_plain_table(scheme: str) -> None:
    grid = (4, 3, 5)
    table = interpolated_positions(scheme, grid, grid, 48)
    assert torch.equal(table, position_table(scheme, grid, 48))


@pytest.mark.parametrize("scheme", ["sincos_1d", "sincos_3d"])
def test_half_the_frames_take_the_mean_of_two_pretrained_times(scheme: str) -> None:
    whole = position_table(scheme, (8, 3, 5), 48).view(4, 2, 15, 48)
    half = interpolated_positions(scheme, (8, 3, 5), (4, 3, 5), 48).view(4, 15, 48)
    assert torch.allclose(half, whole.mean(1), atol=1e-5)


def test_interpolation_keeps_places_where_recomputing_moves_them() -> None:
    """Every place of a finer grid is most like the pretrained place that covers it."""
    coarse, fine = (2, 4, 4), (4, 8, 8)
    covering = torch.arange(32).view(coarse)
    for axis in range(3):
        covering = covering.repeat_interleave(2, dim=axis)
    pretrained = position_table("sincos_3d", coarse, 96)

    def share_at_home(table: torch.Tensor) -> float:
        nearest = torch.cdist(table, pretrained).argmin(1)
        return (nearest == covering.flatten()).float().mean().item()

    assert share_at_home(interpolated_positions("sincos_3d", coarse, fine, 96)) == 1
    assert share_at_home(position_table("sincos_3d", fine, 96)) < 0.5
