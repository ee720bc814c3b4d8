"""Clusters, orders and masks."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from arvideo_ds.geometry import Geometry
from arvideo_ds.models.order import (
    attention_bias,
    cluster_tokens,
    fixed_order,
    may_see_before,
    may_see_up_to,
    random_order,
    step_numbers,
)
from arvideo_ds.randomness import draw_key

GEOMETRY = Geometry(clip=(8, 24, 32), patch=(2, 4, 4), cluster=(2, 3, 4))


def test_clusters_partition_the_tokens() -> None:
    clusters = cluster_tokens(GEOMETRY)
    assert clusters.shape == (GEOMETRY.num_clusters, GEOMETRY.cluster_size)
    assert torch.equal(clusters.flatten().sort().values, torch.arange(GEOMETRY.num_tokens))


def test_a_cluster_is_a_box_of_neighbours() -> None:
    _, h, w = GEOMETRY.grid
    tokens = cluster_tokens(GEOMETRY)[3]  # cluster (0, 1, 1) of grid 2x2x2
    places = {(int(n) // (h * w), int(n) // w % h, int(n) % w) for n in tokens}
    assert places == {(t, y, x) for t in range(2) for y in range(3, 6) for x in range(4, 8)}


def test_spatial_first_finishes_a_time_before_the_next() -> None:
    assert fixed_order(GEOMETRY, "spatial_first").tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_temporal_first_finishes_a_place_before_the_next() -> None:
    assert fixed_order(GEOMETRY, "temporal_first").tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_random_orders_are_uniform_permutations() -> None:
    keys = torch.tensor([draw_key(0, 0, position, 0) for position in range(3000)])
    orders = random_order(keys, 4)
    assert torch.equal(orders.sort(-1).values, torch.arange(4).expand(3000, 4))
    _, counts = orders.unique(dim=0, return_counts=True)
    assert len(counts) == 24
    assert (counts - 125).abs().max() < 5 * 125**0.5


@pytest.mark.parametrize(("mask", "sees_own"), [(may_see_up_to, True), (may_see_before, False)])
def test_masks_follow_the_steps(mask, sees_own: bool) -> None:
    rows, columns = step_numbers(torch.arange(2, 5), 2), step_numbers(torch.arange(1, 4), 4)
    allowed = mask(rows, columns)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            assert bool(allowed[i, j]) == (column < row or (sees_own and column == row))


@pytest.mark.parametrize("shape", [(60, 60), (75, 31), (147, 40)])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_bias_gives_the_bits_of_its_mask(shape: tuple[int, int], precision: torch.dtype) -> None:
    queries, keys = shape
    mask = may_see_up_to(torch.arange(queries) // 15, torch.arange(keys) // 15)
    bias = attention_bias(mask).to(precision)[:, :keys]
    assert bias.stride(0) % 8 == 0  # memory-efficient attention takes it without a copy
    results = []
    for each in (mask, bias):
        torch.manual_seed(0)
        q, k, v = (
            torch.randn(2, 3, n, 16).to(precision).requires_grad_() for n in (queries, keys, keys)
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=each)
        out.square().sum().backward()
        results.append([out, q.grad, k.grad, v.grad])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
