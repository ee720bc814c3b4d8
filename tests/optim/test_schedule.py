"""The learning rate: warm-up, peak, end, no jumps, and nothing but the step decides it."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arvideo_ds.optim.schedule import learning_rate

SCHEDULES = st.fixed_dictionaries(
    {
        "steps": st.integers(10, 300),
        "warmup_steps": st.integers(0, 8),
        "lr": st.floats(1e-4, 1e-2),
        "warmup_lr": st.floats(0, 1e-4),
        "min_lr": st.floats(0, 1e-4),
    }
)


def curve(schedule: dict[str, Any]) -> list[float]:
    return [rate(schedule, step) for step in range(schedule["steps"])]


def rate(schedule: dict[str, Any], step: int) -> float:
    plan: Any = SimpleNamespace(**schedule)
    return learning_rate(plan, step)


@given(SCHEDULES)
def test_it_starts_peaks_and_ends_where_it_is_told(schedule: dict[str, Any]) -> None:
    rates, warmup = curve(schedule), schedule["warmup_steps"]
    assert rates[0] == pytest.approx(schedule["warmup_lr"] if warmup else schedule["lr"])
    assert rates[warmup] == pytest.approx(schedule["lr"])
    assert rates[-1] == pytest.approx(schedule["min_lr"])


@given(SCHEDULES)
def test_it_rises_then_falls(schedule: dict[str, Any]) -> None:
    rates, warmup = curve(schedule), schedule["warmup_steps"]
    # Rates next to each other are rounded.
    slack = 1e-15 * schedule["lr"]
    assert all(b >= a - slack for a, b in itertools.pairwise(rates[: warmup + 1]))
    assert all(b <= a + slack for a, b in itertools.pairwise(rates[warmup:]))


@given(SCHEDULES)
def test_no_step_is_larger_than_the_slope_allows(schedule: dict[str, Any]) -> None:
    rates, warmup = curve(schedule), schedule["warmup_steps"]
    height = schedule["lr"] - schedule["min_lr"]
    steepest = height * math.pi / 2 / (schedule["steps"] - 1 - warmup)
    if warmup:
        steepest = max(steepest, (schedule["lr"] - schedule["warmup_lr"]) / warmup)
    jumps = [abs(b - a) for a, b in itertools.pairwise(rates)]
    # Rates next to each other are rounded, too.
    assert max(jumps) <= steepest * (1 + 1e-9) + 1e-15 * schedule["lr"]


def test_the_warm_up_is_a_line_and_the_rest_a_half_cosine() -> None:
    schedule = {"steps": 111, "warmup_steps": 10, "lr": 1.0, "warmup_lr": 0.0, "min_lr": 0.5}
    rates = curve(schedule)
    assert rates[:11] == pytest.approx([step / 10 for step in range(11)])
    assert rates[60] == pytest.approx(0.75)
    assert rates[10 + 25] == pytest.approx(0.5 + 0.5 * (1 + math.cos(math.pi / 4)) / 2)


def test_only_the_step_decides() -> None:
    schedule = {"steps": 50, "warmup_steps": 5, "lr": 1.0, "warmup_lr": 0.1, "min_lr": 0.2}
    forward = curve(schedule)
    backward = [rate(schedule, step) for step in reversed(range(50))]
    assert forward == backward[::-1]


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 5), (5, 5), (6, 5), (5, 4)])
def test_short_runs_stay_between_start_and_peak(steps: int, warmup: int) -> None:
    schedule = {"steps": steps, "warmup_steps": warmup, "lr": 1.0, "warmup_lr": 0.1, "min_lr": 0.2}
    assert all(0.1 <= rate <= 1.0 for rate in curve(schedule))
