"""Norms and refusals in a few kernels are DeepSpeed's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch

from arvideo_ds.engine import gradient_norm
from arvideo_ds.engine.gradient_norm import install_gradient_norm


@pytest.fixture(scope="module")
def ranks(on_ranks: Callable[..., list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What gradient_norm.py found on two ranks."""
    return on_ranks("gradient_norm.py", 2)


@pytest.mark.dist
@pytest.mark.slow
def test_norms_and_refusals_are_deepspeeds(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0] == ranks[1]
    norms = ranks[0]["norms"]
    assert len(norms) == 7  # stages 0-3 in fp32, 1-3 in bf16
    for case in norms.values():
        ours, theirs = case[""]
        assert ours == pytest.approx(theirs, rel=1e-6)
        assert 1 < ours < 100
        refused = [pair for wrong, pair in case.items() if wrong]
        assert refused == 3 * [[math.inf, math.inf]]


@pytest.mark.dist
@pytest.mark.slow
def test_gradients_of_micro_batches_are_summed_in_fp32(ranks: list[dict[str, Any]]) -> None:
    sums = ranks[0]["sums"]
    print(sums)
    for stage in (1, 2, 3):
        # What is left is the rounding of each micro-batch's average over the ranks.
        assert sums[f"{stage} fp32"] < 0.5 * sums[f"{stage} bf16"]


def test_a_group_without_gradients_on_this_rank_adds_nothing() -> None:
    gradients = {0: [torch.full((4,), 2.0), None], 1: [None], 2: []}
    optimizer = SimpleNamespace(averaged_gradients=gradients, dp_process_group=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradient_norm.dist, "all_reduce", lambda *_, **__: None)
        norms = gradient_norm._group_norms(optimizer, torch.float32)
    assert [float(norm) for norm in norms] == [4, 0, 0]


def test_an_untested_version_of_deepspeed_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed, "__version__", "9.9.9")
    optimizer: Any = SimpleNamespace()
    assert not install_gradient_norm(optimizer)
    assert not vars(optimizer)
