"""Run by test_guard.py under `deepspeed`: prints one JSON line of what bad steps leave behind.

For every stage and precision: the weights after three good steps, once with a bad step among them.
With AdamW, and with an optimiser that itself knows nothing of bad steps.
"""

from __future__ import annotations

import itertools
import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn

from arvideo_ds.config.schema import OptimSettings
from arvideo_ds.engine.build import Engine, build_engine
from arvideo_ds.engine.world import start_world
from arvideo_ds.optim.optimizers import OPTIMIZERS

OPTIMIZERS.register("rmsprop")(lambda groups, _: torch.optim.RMSprop(groups, momentum=0.9))

GOOD, NAN_LOSS, NAN_GRADIENT = 0.0, 1.0, 2.0


# bf16 whose gradients are summed in fp32.
SUMMED = "bf16, fp32 gradients"


def config(stage: int, precision: str, accumulation: int, clip: float) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "bf16": {"enabled": precision != "fp32"},
        "fp16": {"enabled": False},
        "data_types": {"grad_accum_dtype": "bf16" if precision == "bf16" else "fp32"},
        "zero_optimization": {"stage": stage},
        "steps_per_print": 2**31,
    }


def train(engine: Engine, steps: list[float], accumulation: int) -> list[float]:
    """Good steps see the same data, whatever stands between them."""
    refused, good = [], 0
    for kind in steps:
        generator = torch.Generator().manual_seed(good)
        for micro_step in range(accumulation):
            inputs = torch.randn(2, 16, generator=generator)
            parameter = next(engine.module.parameters())
            loss = engine.forward(inputs.to(parameter.dtype)).float().square().mean()
            # On one rank and in one micro-step only.
            if dist.get_rank() == 1 and micro_step == 0:
                if kind == NAN_LOSS:
                    loss = loss * torch.nan
                elif kind == NAN_GRADIENT:
                    loss.register_hook(lambda gradient: gradient * torch.inf)
            engine.backward(loss)
            engine.step()
        refused.append(float(engine.refused()))
        good += kind == GOOD
    return refused


def weights_after(
    steps: list[float], name: str, stage: int, precision: str, accumulation: int, clip: float
) -> tuple[list[float], torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4))
    groups = [{"params": list(model.parameters()), "weight_decay": 0.05}]
    engine = build_engine(
        model, groups, config(stage, precision, accumulation, clip), OptimSettings(name=name)
    )
    engine.set_learning_rate(1e-2)
    refused = train(engine, steps, accumulation)
    full = [safe_get_full_fp32_param(p) for p in engine.module.parameters()]
    plain = list(engine.module.parameters())
    weights = [(p if f is None else f).flatten() for f, p in zip(full, plain, strict=True)]
    return refused, torch.cat(weights).detach().clone()


def main() -> None:
    start_world()
    results = []
    ways = [("adamw", 1, 0.0), ("adamw", 2, 0.5), ("rmsprop", 2, 0.5)]
    lowest = {"fp32": 0, "bf16": 1, SUMMED: 2}
    for (name, *how), stage, precision in itertools.product(ways, range(4), lowest):
        if stage < lowest[precision]:
            continue
        setting = (name, stage, precision, *how)
        _, untouched = weights_after([GOOD] * 3, *setting)
        for bad in (NAN_LOSS, NAN_GRADIENT):
            refused, weights = weights_after([GOOD, bad, GOOD, bad, GOOD], *setting)
            results.append(
                {
                    "case": setting,
                    "bad": bad,
                    "refused": refused,
                    "finite": bool(weights.isfinite().all()),
                    "equal": bool(torch.equal(weights, untouched)),
                }
            )
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps(results), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
