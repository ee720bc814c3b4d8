"""What weights move by at every ZeRO stage: rates by layer, and beside a frozen encoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from arvideo_ds.optim.groups import layer_of

DEPTH, DECAY = 4, 0.5


pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def measured(
    on_ranks: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    return on_ranks("layer_rates.py", 2, tmp_path_factory.mktemp("adapters"))


def test_every_layer_moves_by_its_own_rate(measured: dict[str, Any]) -> None:
    table = measured["rates"]
    assert table.keys() == {"0", "1", "2", "3"}
    for stage, moved in table.items():
        assert {layer_of(name, DEPTH + 1) for name in moved} == set(range(DEPTH + 2))
        for name, rate in moved.items():
            expected = DECAY ** (DEPTH + 1 - layer_of(name, DEPTH + 1))
            assert rate == pytest.approx(expected, rel=0.02), (stage, name)


def test_adapters_and_heads_train_beside_frozen_weights_at_every_stage(
    measured: dict[str, Any],
) -> None:
    """With and without recomputation, in one curve that any other stage continues; frozen weights
    keep their fp32 bits in half precision, and have no moments nor average."""
    assert len(measured["frozen"]) == 4 + 3 + 3
    for case, found in measured["frozen"].items():
        train, _, precision = case.split("-")
        allowed = {"fp32": 1e-5, "bf16": 2e-2}[precision]
        assert found["changed"] == found["idle"] == [], case
        assert found["frozen_averages"] and found["kinds"] == ["weight"], case
        assert found["curve"] == pytest.approx(found["plain"], rel=allowed), case
        assert found["resumed"] == pytest.approx(found["curve"][3:], rel=allowed), case
        lowest = {"fp32": 0, "bf16": 1}[precision]
        reference = measured["frozen"][f"{train}-{lowest}-{precision}"]
        assert found["curve"] == pytest.approx(reference["curve"], rel=allowed), case
