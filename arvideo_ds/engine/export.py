"""Whole weights out of any ZeRO stage."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import save_file

from arvideo_ds.engine.build import Engine


def save_weights(engine: Engine, path: Path, *, prefix: str) -> None:
    """Write the fp32 weights below `prefix` of the module as safetensors. Collective.

    The optimiser's fp32 master weights where the run trains in half precision. Written to a
    temporary name and renamed, by rank 0.
    """
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        # Gathers a partitioned parameter, so every rank takes part.
        full = safe_get_full_fp32_param(parameter)
        full = parameter.detach() if full is None else full
        if dist.get_rank() == 0 and name.startswith(prefix):
            weights[name.removeprefix(prefix)] = full.float().cpu().contiguous().clone()
    if dist.get_rank() == 0:
        temporary = path.with_name(path.name + ".new")
        save_file(weights, temporary)
        temporary.replace(path)
    dist.barrier()
