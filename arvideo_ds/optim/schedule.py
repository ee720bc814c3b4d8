"""The learning rate as a pure function of the step: resuming replays nothing."""

from __future__ import annotations

import math
from collections.abc import Callable

from arvideo_ds.planning.plan import RunPlan
from arvideo_ds.registry import Registry

# Maps a step after the warm-up to the share, 1..0, of the height between `min_lr` and `lr`.
Shape = Callable[[RunPlan, int], float]


def learning_rate(plan: RunPlan, step: int) -> float:
    """Rate of step 0..steps-1: linear from `warmup_lr` to `lr`, then by `plan.schedule`."""
    if step < plan.warmup_steps:
        return plan.warmup_lr + (plan.lr - plan.warmup_lr) * step / plan.warmup_steps
    share = SCHEDULES.choose(plan.schedule, key="optim.schedule")(plan, step)
    return plan.min_lr + (plan.lr - plan.min_lr) * share


def cosine(plan: RunPlan, step: int) -> float:
    """Half a cosine from the warm-up to the last step."""
    return 0.5 * (1 + math.cos(math.pi * _progress(plan, step, plan.warmup_steps)))


def constant(plan: RunPlan, step: int) -> float:  # noqa: ARG001
    return 1.0


def wsd(plan: RunPlan, step: int) -> float:
    """Warm-up, stable, decay: constant, then 1 - sqrt(x) over the last `decay_steps`.

    Source: Hu et al. 2024 (arXiv 2404.06395), section 4, for the three stages; Haegele et al. 2024
    (arXiv 2405.18392), section 3, for the shape of the decay.
    """
    start = max(plan.warmup_steps, plan.steps - 1 - plan.decay_steps)
    return 1 - math.sqrt(max(0.0, _progress(plan, step, start)))


def _progress(plan: RunPlan, step: int, start: int) -> float:
    """0 at step `start`, 1 at the last one; negative before."""
    return min(1.0, (step - start) / max(1, plan.steps - 1 - start))


# By the value of `optim.schedule`.
SCHEDULES: Registry[Shape] = Registry(
    "schedule", {"cosine": cosine, "constant": constant, "wsd": wsd}
)
