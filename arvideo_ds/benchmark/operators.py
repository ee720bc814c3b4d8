"""Where a step's time goes: PyTorch's operators, grouped."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from arvideo_ds.benchmark.step import Step
from arvideo_ds.data.loader import Batch

REST = "everything else"
# The first that matches an operator's name has it. Unfused attention is the only user of bmm.
_GROUPS = {
    "optimiser": r"adam|Optimizer\.",
    "attention": r"scaled_dot_product|attention|softmax|\bbmm\b|baddbmm",
    "matrix products": r"\b(add)?mm\b|\blinear\b|matmul|mkldnn_linear",
    "normalisation": r"layer_norm",
    "activation": r"gelu",
}
# Operators of the rest with a smaller share are one line together.
_NAMED_FROM = 0.001


@dataclass(frozen=True)
class Operator:
    """One operator on tensors of one shape: ms of its own for each step, and calls."""

    name: str
    shapes: str
    ms: float
    calls: float

    @property
    def group(self) -> str:
        found = (group for group, names in _GROUPS.items() if re.search(names, self.name))
        return next(found, REST)


def profile_steps(
    step: Step, batch: Batch, steps: int, trace: Path | None = None
) -> list[Operator]:
    """Operators of so many steps, after one more; a Chrome trace into `trace`."""
    on_gpu = step.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    step.run(batch)
    if on_gpu:
        torch.cuda.synchronize(step.device)
    with profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(steps):
            step.run(batch)
        # Inside, or what the GPU has not done yet would be missing.
        if on_gpu:
            torch.cuda.synchronize(step.device)
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    events = profiler.key_averages(group_by_input_shape=True)
    return [_operator(event, steps, on_gpu=on_gpu) for event in events if _is_operator(event)]


def _is_operator(event: Any) -> bool:
    """Kernels count with the operator that started them, not as rows of their own."""
    return bool(event.device_type == DeviceType.CPU)


def _operator(event: Any, steps: int, *, on_gpu: bool) -> Operator:
    microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
    shapes = " ".join("x".join(map(str, s)) for s in event.input_shapes or () if s)
    return Operator(event.key, shapes, microseconds / 1000 / steps, event.count / steps)


def by_group(operators: Iterable[Operator]) -> dict[str, Any]:
    """Self time and share of each group, and every operator of the rest by name and shapes."""
    operators = sorted(operators, key=lambda operator: -operator.ms)
    total = sum(operator.ms for operator in operators)
    groups = dict.fromkeys((*_GROUPS, REST), 0.0)
    for operator in operators:
        groups[operator.group] += operator.ms
    rest = [operator for operator in operators if operator.group == REST]
    named = [operator for operator in rest if operator.ms >= _NAMED_FROM * total]
    return {
        "self_ms_per_step": round(total, 3),
        "groups": {name: _of(ms, total) for name, ms in groups.items()},
        "rest_by_name": _by_name(rest, total),
        "rest": [
            {
                "operator": operator.name,
                "shapes": operator.shapes,
                "calls_per_step": round(operator.calls, 2),
                **_of(operator.ms, total),
            }
            for operator in named
        ],
    }


def _by_name(operators: Iterable[Operator], total: float) -> dict[str, Any]:
    sums: dict[str, float] = {}
    for operator in operators:
        sums[operator.name] = sums.get(operator.name, 0.0) + operator.ms
    largest_first = sorted(sums.items(), key=lambda item: -item[1])
    return {name: _of(ms, total) for name, ms in largest_first if ms >= _NAMED_FROM * total}


def _of(ms: float, total: float) -> dict[str, float]:
    return {"ms": round(ms, 3), "share_pct": round(100 * ms / total, 2) if total else 0.0}
