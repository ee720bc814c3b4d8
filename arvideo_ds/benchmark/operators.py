"""Where a step's time goes: PyTorch's operators, grouped."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from arvideo_ds.benchmark.step import Step, synchronize
from arvideo_ds.data.loader import Batch

REST = "everything else"
# The first matching group counts. Only unfused attention uses bmm.
_GROUPS = {
    "optimiser": r"adam|Optimizer\.",
    "attention": r"scaled_dot_product|attention|softmax|\bbmm\b|baddbmm",
    "matrix products": r"\b(add)?mm\b|\blinear\b|matmul|mkldnn_linear",
    "normalisation": r"layer_norm",
    "activation": r"gelu",
}
# Other operators with a smaller share are not listed.
_LEAST_SHARE = 0.001


@dataclass(frozen=True)
class Operator:
    """One operator on tensors of one shape: self time in ms and calls, per step."""

    name: str
    shapes: str
    ms: float
    calls: float

    @property
    def group(self) -> str:
        groups = (group for group, names in _GROUPS.items() if re.search(names, self.name))
        return next(groups, REST)


def profile_steps(
    step: Step, batch: Batch, steps: int, trace: Path | None = None
) -> list[Operator]:
    """Operators of `steps` steps, after one to warm up; writes a Chrome trace to `trace`."""
    on_gpu = step.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    step.run(batch)
    synchronize(step.device)
    with profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(steps):
            step.run(batch)
        # Inside, or unfinished kernels of the GPU would be missing.
        synchronize(step.device)
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(trace))
    operators, time = [], "self_device_time_total" if on_gpu else "self_cpu_time_total"
    for event in profiler.key_averages(group_by_input_shape=True):
        # Kernels of the GPU count with the operator that started them.
        if event.device_type == DeviceType.CPU:
            shapes = " ".join("x".join(map(str, s)) for s in event.input_shapes or () if s)
            ms = getattr(event, time) / 1000 / steps
            operators.append(Operator(event.key, shapes, ms, event.count / steps))
    return operators


def by_group(operators: Iterable[Operator]) -> dict[str, Any]:
    """Self time and share of each group; the other operators by name, and by name and shapes."""
    operators = sorted(operators, key=lambda operator: -operator.ms)
    total = sum(operator.ms for operator in operators)
    groups = dict.fromkeys((*_GROUPS, REST), 0.0)
    for operator in operators:
        groups[operator.group] += operator.ms
    rest = [operator for operator in operators if operator.group == REST]
    return {
        "self_ms_per_step": round(total, 3),
        "groups": {name: _share(ms, total) for name, ms in groups.items()},
        "rest_by_name": _by_name(rest, total),
        "rest": [
            {
                "operator": operator.name,
                "shapes": operator.shapes,
                "calls_per_step": round(operator.calls, 2),
                **_share(operator.ms, total),
            }
            for operator in rest
            if operator.ms >= _LEAST_SHARE * total
        ],
    }


def _by_name(operators: Iterable[Operator], total: float) -> dict[str, Any]:
    sums: dict[str, float] = {}
    for operator in operators:
        sums[operator.name] = sums.get(operator.name, 0.0) + operator.ms
    largest_first = sorted(sums.items(), key=lambda item: -item[1])
    return {name: _share(ms, total) for name, ms in largest_first if ms >= _LEAST_SHARE * total}


def _share(ms: float, total: float) -> dict[str, float]:
    return {"ms": round(ms, 3), "share_pct": round(100 * ms / total, 2) if total else 0.0}
