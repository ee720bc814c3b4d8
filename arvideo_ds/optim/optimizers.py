"""Optimisers by `optim.name`; the table imports no torch.

A builder makes a torch optimiser from parameter groups and settings. The engine sets the learning
rate. The optimiser's step must keep the rules of optim/trial.py, which every start checks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from arvideo_ds.config.schema import OptimSettings
from arvideo_ds.registry import Registry

# Returns a torch.optim.Optimizer.
Builder = Callable[[list[dict[str, Any]], OptimSettings], Any]

OPTIMIZERS: Registry[Builder] = Registry("optimizer", {"adamw": "arvideo_ds.optim.adamw:adamw"})
