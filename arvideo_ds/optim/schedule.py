"""The learning rate as a pure function of the step: resuming replays nothing."""

from __future__ import annotations

import math


def learning_rate(
    step: int, *, steps: int, warmup_steps: int, peak: float, start: float, end: float
) -> float:
    """Learning rate of step 0..steps-1: linear from `start` to `peak`, then a cosine to `end`."""
    if step < warmup_steps:
        return start + (peak - start) * step / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
