"""The learning rate as a pure function of the step: resuming replays nothing."""

from __future__ import annotations

import math

from arvideo_ds.planning.plan import RunPlan


def learning_rate(plan: RunPlan, step: int) -> float:
    """Rate of step 0..steps-1: linear from `warmup_lr` to `lr`, then a cosine to `min_lr`."""
    if step < plan.warmup_steps:
        return plan.warmup_lr + (plan.lr - plan.warmup_lr) * step / plan.warmup_steps
    progress = (step - plan.warmup_steps) / max(1, plan.steps - 1 - plan.warmup_steps)
    height = plan.lr - plan.min_lr
    return plan.min_lr + height * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
