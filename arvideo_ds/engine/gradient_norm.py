"""The gradient norm of ZeRO in a few kernels and one wait of the host.

Before an update DeepSpeed checks every gradient for infinities and takes its norm, in about ten
kernels for each parameter, and reads a result for each group of parameters: at ZeRO-1 and -2 3,219
kernels and 7 waits for ViT-B, where forward and backward pass take 715. Here PyTorch's foreach norm
replaces both: a norm is finite only if every gradient is. On a CPU it has the same bits as
DeepSpeed's (tests/engine/test_gradient_norm.py).
"""

from __future__ import annotations

from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

# Versions whose step() calls the methods that are replaced, in the order that is assumed.
TESTED_VERSIONS = frozenset({"0.19.8"})


def install_gradient_norm(optimizer: Any) -> bool:
    """Replace DeepSpeed's norms and overflow checks in this optimiser; returns whether it was done.

    Stage 0, offloaded optimisers and untested versions of DeepSpeed keep DeepSpeed's own.
    """
    if deepspeed.__version__ not in TESTED_VERSIONS:
        return False
    if isinstance(optimizer, DeepSpeedZeroOptimizer) and not optimizer.cpu_offload:
        norm = _GradientNorm(optimizer)
        optimizer.has_overflow = norm.has_overflow
        optimizer.scaled_global_norm = norm.scaled_global_norm
        return True
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3) and not optimizer.offload_optimizer:
        # Its overflow check, for fp16 alone, looks at one flat buffer.
        optimizer._get_norm_groups = lambda: _group_norms(optimizer, torch.float64)
        return True
    return False


class _GradientNorm:
    """The methods of ZeRO-1 and -2 that step() calls: the check, except in fp32, then the norm."""

    def __init__(self, optimizer: DeepSpeedZeroOptimizer) -> None:
        self._optimizer = optimizer
        self._checked: Tensor | None = None

    def has_overflow(self, partition_gradients: bool = True) -> bool:  # noqa: ARG002
        """Whether a gradient of any rank is not finite. Collective."""
        self._checked = self._measure()
        return not bool(self._checked.isfinite())

    def scaled_global_norm(self, norm_type: int = 2) -> Tensor:  # noqa: ARG002
        """Norm over all groups and ranks, times the loss scale; a scalar on the host. Collective.

        Infinity for gradients that are not finite.
        """
        norm, self._checked = self._checked, None
        return self._measure() if norm is None else norm

    def _measure(self) -> Tensor:
        return combine_grad_norm_groups(_group_norms(self._optimizer, torch.float32))


def _group_norms(optimizer: Any, dtype: torch.dtype) -> list[Tensor]:
    """Norm of each parameter group over all ranks. Collective, and the one wait of a step.

    On the host, where DeepSpeed reads them several times. dtype: as which ranks add up squares.
    """
    gradients = [optimizer.averaged_gradients[i] for i in range(len(optimizer.averaged_gradients))]
    squares = torch.stack([_sum_of_squares(group) for group in gradients]).to(dtype)
    dist.all_reduce(squares, group=optimizer.dp_process_group)
    return list(squares.cpu().sqrt())


def _sum_of_squares(gradients: list[Tensor | None]) -> Tensor:
    """float64 scalar, from norms in float64 as DeepSpeed takes them."""
    present = [gradient for gradient in gradients if gradient is not None]
    if not present:  # a small group has nothing in some ranks' partitions
        return torch.zeros((), dtype=torch.float64, device=get_accelerator().current_device_name())
    norms = torch._foreach_norm(present, 2, dtype=torch.float64)
    return torch.stack(norms).square().sum()
