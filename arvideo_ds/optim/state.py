"""The state of an optimiser in checkpoints: moments, as large as the weight, and number of steps.

An optimiser with any other state is refused at the start (trial.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

STEP = "step"


def moments(optimizer: Optimizer, weight: Tensor) -> dict[str, Tensor]:
    """The moments of a weight by name; none before the first step."""
    return {
        key: value
        for key, value in optimizer.state.get(weight, {}).items()
        if torch.is_tensor(value) and value.numel() == weight.numel() and key != STEP
    }


def steps_applied(optimizer: Optimizer) -> int:
    """Updates that the optimiser has counted; 0 where it counts none."""
    return max((int(state[STEP]) for state in optimizer.state.values() if STEP in state), default=0)


def make_state(
    optimizer: Optimizer, weights: Iterable[Tensor], names: Iterable[str], steps: int
) -> None:
    """Give the optimiser the state that it would make at its first step: moments of 0."""
    # DeepSpeed's optimisers count in an int, torch's in a tensor.
    in_int = type(optimizer).__module__.startswith("deepspeed.")
    for weight in weights:
        state: dict[str, Any] = {name: torch.zeros_like(weight) for name in names}
        state[STEP] = steps if in_int else torch.tensor(float(steps), device=weight.device)
        optimizer.state[weight] = state
