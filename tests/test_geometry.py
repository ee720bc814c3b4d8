"""Geometry: counts of tokens and clusters, and what is said when shapes do not divide."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arvideo_ds.errors import UserError
from arvideo_ds.geometry import Geometry, num_kept

SMALL = st.integers(1, 6)
TRIPLES = st.tuples(SMALL, SMALL, SMALL)


@given(clusters=TRIPLES, cluster=TRIPLES, patch=TRIPLES)
def test_clusters_times_cluster_times_cube_is_the_clip(
    clusters: tuple[int, int, int], cluster: tuple[int, int, int], patch: tuple[int, int, int]
) -> None:
    grid = tuple(a * b for a, b in zip(clusters, cluster, strict=True))
    t, h, w = (a * b for a, b in zip(grid, patch, strict=True))
    geometry = Geometry((t, h, w), patch, cluster)
    assert geometry.grid == grid
    assert geometry.cluster_grid == clusters
    assert geometry.num_clusters * geometry.cluster_size == geometry.num_tokens == math.prod(grid)
    assert geometry.num_tokens * geometry.cube_values == t * h * w * 3


def test_the_papers_default_geometry() -> None:
    geometry = Geometry((16, 224, 224), (2, 16, 16), (2, 7, 7))
    assert geometry.grid == (8, 14, 14)
    assert (geometry.num_tokens, geometry.cube_values) == (1568, 1536)
    assert (geometry.num_clusters, geometry.cluster_size) == (16, 98)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("part", ["patch", "cluster"])
def test_an_axis_that_does_not_divide_is_named_with_both_numbers_and_its_setting(
    part: str, axis: int
) -> None:
    # 30 x 40 x 50 pixels in cubes of 2 x 2 x 2 are 15 x 20 x 25 tokens; 7 and 11 divide none.
    shapes = {"patch": [2, 2, 2], "cluster": [1, 1, 1]}
    wrong, whole = {"patch": (7, (30, 40, 50)), "cluster": (11, (15, 20, 25))}[part]
    shapes[part][axis] = wrong
    with pytest.raises(UserError) as raised:
        Geometry((30, 40, 50), tuple(shapes["patch"]), tuple(shapes["cluster"]))
    message = str(raised.value)
    name = ("frames", "height", "width")[axis]
    assert f"{name} {whole[axis]} is not a multiple of {wrong}" in message
    assert {"patch": "model.patch", "cluster": "objective.cluster"}[part] in message


def test_the_numbers_offered_instead_do_divide() -> None:
    with pytest.raises(UserError) as raised:
        Geometry((16, 224, 224), (2, 15, 16), (1, 1, 1))
    offered = str(raised.value).split("one of [")[1].split("]")[0]
    for height in map(int, offered.split(", ")):
        Geometry((16, 224, 224), (2, height, 16), (1, 1, 1))


@pytest.mark.parametrize("patch", [(0, 16, 16), (2, -16, 16)])
def test_sizes_below_one_are_refused_not_divided_by(patch: tuple[int, int, int]) -> None:
    with pytest.raises(UserError, match="positive"):
        Geometry((16, 224, 224), patch, (1, 1, 1))


def test_a_share_keeps_half_up_and_never_nothing() -> None:
    assert num_kept(1 - 0.8, 98) == 20  # 19.6
    assert num_kept(0.5, 1) == 1
    assert num_kept(0.5, 5) == 3  # 2.5, where rounding to even gives 2
    assert num_kept(0.0, 98) == 1
    assert all(num_kept(1.0, size) == size for size in range(1, 200))
