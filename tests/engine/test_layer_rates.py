"""Layer-wise learning rates are what the weights really move by, at every ZeRO stage."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from arvideo_ds.optim.groups import layer_of

DEPTH, DECAY = 4, 0.5


@pytest.mark.dist
def test_every_layer_moves_by_its_own_rate(
    on_ranks: Callable[..., dict[str, dict[str, float]]],
) -> None:
    table = on_ranks("layer_rates.py", 2)
    assert table.keys() == {"0", "1", "2", "3"}
    for stage, moved in table.items():
        assert {layer_of(name, DEPTH + 1) for name in moved} == set(range(DEPTH + 2))
        for name, rate in moved.items():
            expected = DECAY ** (DEPTH + 1 - layer_of(name, DEPTH + 1))
            assert rate == pytest.approx(expected, rel=0.02), (stage, name)
