"""Draws on the device: pure functions of a key, uniform, independent."""

from __future__ import annotations

import torch

from arvideo_ds.models.draws import _GOLDEN, _mix, random_ranks, random_subsets
from arvideo_ds.randomness import draw_key


def keys(count: int, epoch: int = 0) -> torch.Tensor:
    return torch.tensor([draw_key(0, epoch, position, 0) for position in range(count)])


def test_the_hash_is_splitmix64() -> None:
    # First outputs of the reference implementation for seed 0.
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    mixed = _mix(torch.tensor([1, 2, 3]) * _GOLDEN)
    assert [int(x) % 2**64 for x in mixed] == expected


def test_ranks_are_permutations_that_repeat_with_the_key() -> None:
    ranks = random_ranks(keys(50), 1, (3, 16))
    assert torch.equal(ranks.sort(-1).values, torch.arange(16).expand(50, 3, 16))
    assert torch.equal(ranks, random_ranks(keys(50), 1, (3, 16)))


def test_clips_sets_purposes_and_epochs_draw_differently() -> None:
    ranks = random_ranks(keys(50), 1, (3, 16))
    assert len({tuple(row.tolist()) for row in ranks.flatten(0, 1)}) == 150
    assert not torch.equal(ranks, random_ranks(keys(50), 2, (3, 16)))
    assert not torch.equal(ranks, random_ranks(keys(50, epoch=1), 1, (3, 16)))


def test_a_clips_draw_does_not_depend_on_its_batch() -> None:
    assert torch.equal(random_ranks(keys(9)[4:5], 1, (5, 7)), random_ranks(keys(9), 1, (5, 7))[4:5])


def test_subsets_are_uniform_without_replacement() -> None:
    subsets = random_subsets(keys(4000), 2, 2, 10, 3)
    assert (subsets.diff(dim=-1) > 0).all()
    frequency = torch.bincount(subsets.flatten(), minlength=10) / 8000
    # Each item is in 3 of 10 subsets; five standard errors.
    assert (frequency - 0.3).abs().max() < 5 * (0.3 * 0.7 / 8000) ** 0.5
    together = (subsets[:, 0, :, None] == subsets[:, 1, None, :]).any(-1).float().mean()
    assert abs(together - 0.3) < 5 * (0.3 * 0.7 / 12000) ** 0.5  # the two sets are independent


def test_keys_of_neighbouring_clips_share_nothing() -> None:
    seen = {
        draw_key(seed, epoch, position, repeat)
        for seed in range(3)
        for epoch in range(3)
        for position in range(100)
        for repeat in range(3)
    }
    assert len(seen) == 2700
    assert all(0 <= key < 2**63 for key in seen)
