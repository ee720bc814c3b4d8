"""Clusters: their tokens, the order in which they are predicted, and the attention masks.

Tokens are in the sampled order, so masks depend on step numbers alone and are equal for all clips.

B clips, C clusters, S tokens per cluster. Masks: True = may attend, or the bias made of them.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from arvideo_ds.geometry import Geometry
from arvideo_ds.models.draws import random_ranks

_ORDER_PURPOSE = 1
# Memory-efficient attention copies a bias whose rows are not so many elements apart.
_ALIGNMENT = 8


def cluster_tokens(geometry: Geometry) -> Tensor:
    """Token indices of every cluster, C x S; clusters and tokens count along (time, row, column).

    Source: ARVideo (arXiv 2405.15160), section 3.2.
    """
    (t, h, w), (kt, kh, kw) = geometry.grid, geometry.cluster
    tokens = torch.arange(geometry.num_tokens).view(t, h, w)
    return rearrange(tokens, "(t kt) (h kh) (w kw) -> (t h w) (kt kh kw)", kt=kt, kh=kh, kw=kw)


def fixed_order(geometry: Geometry, order: str) -> Tensor:
    """Cluster indices in the order of prediction, C.

    spatial_first: all places of a time, then the next time. temporal_first: all times of a place,
    then the next place. Source: ARVideo, section 3.3 and Table 7.
    """
    t, h, w = geometry.cluster_grid
    clusters = torch.arange(geometry.num_clusters).view(t, h, w)
    pattern = {"spatial_first": "t h w -> (t h w)", "temporal_first": "t h w -> (h w t)"}[order]
    return rearrange(clusters, pattern)


def random_order(keys: Tensor, num_clusters: int) -> Tensor:
    """An independent uniform permutation of the clusters for every clip: int64, B x C."""
    return random_ranks(keys, _ORDER_PURPOSE, (num_clusters,))


def step_numbers(steps: Tensor, tokens_per_step: int) -> Tensor:
    """The step of each token in a sequence with equally many tokens per step."""
    return steps.repeat_interleave(tokens_per_step)


def may_see_up_to(rows: Tensor, columns: Tensor) -> Tensor:
    """Step i attends to steps <= i (block-causal, with all of cluster i)."""
    return rows[:, None] >= columns[None, :]


def may_see_before(rows: Tensor, columns: Tensor) -> Tensor:
    """Step i attends to steps < i."""
    return rows[:, None] > columns[None, :]


def attention_bias(mask: Tensor) -> Tensor:
    """A mask Q M as the bias that attention adds to scores: 0 or -inf, float32, Q x M and padding.

    PyTorch would make it of a boolean mask in every layer and call. Its first M columns are used.
    """
    bias = torch.full((len(mask), -(-mask.shape[1] // _ALIGNMENT) * _ALIGNMENT), -torch.inf)
    bias[:, : mask.shape[1]].masked_fill_(mask, 0)
    return bias
