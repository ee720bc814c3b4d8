"""Cubes, targets and position tables."""

from __future__ import annotations

import pytest
import torch

from arvideo_ds.models.cubes import from_cubes, pick, pixel_targets, standardize, to_cubes
from arvideo_ds.models.positions import position_table

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
