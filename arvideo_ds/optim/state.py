"""State that an optimiser keeps for a weight, as checkpoints save and restore it.

Saved are the moments, tensors with as many values as the weight, and the number of steps. An
optimiser that keeps anything else is refused at the start (trial.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

STEP = "step"


def moments(optimizer: Optimizer, weight: Tensor) -> dict[str, Tensor]:
    """State of a weight, value by value; empty before the first step."""
    state = optimizer.state.get(weight, {})
    return {
        key: value
        for key, value in state.items()
        if torch.is_tensor(value) and value.numel() == weight.numel() and key != STEP
    }


def steps_applied(optimizer: Optimizer) -> int:
    """Updates that the optimiser has counted; 0 for one that counts none."""
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
