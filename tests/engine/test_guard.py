"""A step that is not finite leaves nothing behind: not in the weights, not in the optimiser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.mark.dist
def test_steps_that_are_not_finite_leave_no_trace_at_any_stage_and_precision(
    on_ranks: Callable[..., list[dict[str, Any]]],
) -> None:
    results = on_ranks("refuse.py", 2)
    assert len(results) == 3 * (4 + 3 + 2) * 2
    # The same weights, bit for bit, as without the bad steps: none was counted either.
    assert [r for r in results if not r["equal"] or r["refused"] != [0, 1, 0, 1, 0]] == []
