"""AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), torch's fused one."""

from __future__ import annotations

from typing import Any

import torch

from arvideo_ds.config.schema import OptimSettings


def adamw(groups: list[dict[str, Any]], settings: OptimSettings) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, betas=settings.betas, fused=True)
