"""Attention masks; True = may attend.

Tokens are in the sampled order, so the masks depend on the step numbers alone: the same
matrices for every clip, built once.
"""

from __future__ import annotations

from torch import Tensor


def step_numbers(steps: Tensor, tokens_per_step: int) -> Tensor:
    """The step of each token of a sequence in which every one of `steps` has equally many."""
    return steps.repeat_interleave(tokens_per_step)


def may_see_up_to(rows: Tensor, columns: Tensor) -> Tensor:
    """Step i attends to steps <= i (block-causal; the whole own cluster included)."""
    return rows[:, None] >= columns[None, :]


def may_see_before(rows: Tensor, columns: Tensor) -> Tensor:
    """Step i attends to steps < i."""
    return rows[:, None] > columns[None, :]
