"""The learning rate: warm-up, peak, end, no jumps, and nothing but the step decides it."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arvideo_ds.config import load_recipe
from arvideo_ds.optim.schedule import SCHEDULES, learning_rate
from arvideo_ds.planning.plan import make_plan

NUMBERS = st.fixed_dictionaries(
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
    plan: Any = SimpleNamespace(**{"schedule": "cosine", "decay_steps": 0, **schedule})
    return learning_rate(plan, step)


@given(NUMBERS)
def test_it_starts_peaks_and_ends_where_it_is_told(schedule: dict[str, Any]) -> None:
    rates, warmup = curve(schedule), schedule["warmup_steps"]
    assert rates[0] == pytest.approx(schedule["warmup_lr"] if warmup else schedule["lr"])
    assert rates[warmup] == pytest.approx(schedule["lr"])
    assert rates[-1] == pytest.approx(schedule["min_lr"])


@given(NUMBERS)
def test_it_rises_then_falls(schedule: dict[str, Any]) -> None:
    rates, warmup = curve(schedule), schedule["warmup_steps"]
    # Rates next to each other are rounded.
    slack = 1e-15 * schedule["lr"]
    assert all(b >= a - slack for a, b in itertools.pairwise(rates[: warmup + 1]))
    assert all(b <= a + slack for a, b in itertools.pairwise(rates[warmup:]))


@given(NUMBERS)
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


def rate_of_earlier_versions(schedule: dict[str, Any], step: int) -> float:
    """The formula of versions without `optim.schedule`."""
    warmup, lr, low = (schedule[key] for key in ("warmup_steps", "lr", "min_lr"))
    if step < warmup:
        return schedule["warmup_lr"] + (lr - schedule["warmup_lr"]) * step / warmup
    progress = (step - warmup) / max(1, schedule["steps"] - 1 - warmup)
    return low + (lr - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@given(NUMBERS)
def test_the_cosine_keeps_every_bit_of_earlier_versions(numbers: dict[str, Any]) -> None:
    steps = range(numbers["steps"])
    assert curve(numbers) == [rate_of_earlier_versions(numbers, step) for step in steps]


@given(NUMBERS, st.floats(0.01, 1))
def test_wsd_is_constant_and_falls_in_the_share_of_its_decay(
    numbers: dict[str, Any], share: float
) -> None:
    steps, warmup = numbers["steps"], numbers["warmup_steps"]
    decay = max(1, round(share * steps))
    rates = curve({**numbers, "schedule": "wsd", "decay_steps": decay})
    start, height = max(warmup, steps - 1 - decay), numbers["lr"] - numbers["min_lr"]
    assert rates[:warmup] == curve(numbers)[:warmup]
    assert rates[warmup : start + 1] == pytest.approx([numbers["lr"]] * (start + 1 - warmup))
    assert rates[-1] == pytest.approx(numbers["min_lr"])
    falls = [a - b for a, b in itertools.pairwise(rates[start:])]
    slack = 1e-12 * numbers["lr"]
    # The root is steepest where the decay begins.
    assert falls[0] == pytest.approx(height / math.sqrt(steps - 1 - start), abs=slack)
    assert all(later <= earlier + slack for earlier, later in itertools.pairwise(falls))
    assert falls[-1] >= -slack


def test_wsd_alone_is_the_cooldown_of_a_run_at_a_constant_rate() -> None:
    """What a run of constant rate leaves out: warm-up 0, share 1."""
    numbers = {"steps": 101, "warmup_steps": 0, "lr": 1.0, "warmup_lr": 0.0, "min_lr": 0.2}
    rates = curve({**numbers, "schedule": "wsd", "decay_steps": 101})
    assert (rates[0], rates[25], rates[-1]) == pytest.approx((1.0, 0.2 + 0.8 * 0.5, 0.2))
    assert set(curve({**numbers, "schedule": "constant"})) == {1.0}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_run_resumed_in_the_middle_of_its_decay_has_the_rates_of_the_whole_run(
    name: str,
) -> None:
    """The plan of the second start, with other ranks, gives the rates of the first one."""
    keys = [f"optim.schedule={name}", "train.max_steps=40", "optim.warmup_steps=4"]
    plans = [
        make_plan(load_recipe("demo", keys), world_size=ranks, num_videos=2400) for ranks in (1, 4)
    ]
    assert plans[0].decay_steps == (8 if name == "wsd" else 0)
    whole = [learning_rate(plans[0], step) for step in range(40)]
    assert [learning_rate(plans[1], step) for step in range(35, 40)] == whole[35:]


def test_a_longer_run_of_wsd_has_the_rates_of_the_constant_run_that_it_continues() -> None:
    """`--resume` of a run at a constant rate: no step of the parent would have had another rate."""

    def rates(*keys: str) -> list[float]:
        recipe = load_recipe("demo", ["optim.warmup_steps=4", *keys])
        plan = make_plan(recipe, world_size=1, num_videos=2400)
        return [learning_rate(plan, step) for step in range(plan.steps)]

    parent = rates("optim.schedule=constant", "train.max_steps=39")
    child = rates("optim.schedule=wsd", "train.max_steps=50", "optim.decay_share=0.2")
    assert child[:39] == parent
    assert child[40] < parent[-1]
