"""Parameter groups: matrices decay; biases, norms and learned queries do not."""

from __future__ import annotations

from typing import Any

from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for an optimiser, each with `name`, `params` and `weight_decay`; none is empty.

    Vectors are excluded from decay, as in VideoMAE's official code.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim > 1]
    vectors = [p for p in trained if p.ndim <= 1]
    groups = [
        {"name": "decayed", "params": matrices, "weight_decay": weight_decay},
        {"name": "not_decayed", "params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
