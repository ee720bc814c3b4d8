"""Run by test_reshape.py under `deepspeed`: save FOLDER, or load FOLDER at every stage.

Both then do one step more and save again; what they agree on is compared by the test.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from arvideo_ds.config.schema import OptimSettings
from arvideo_ds.engine.build import Engine, build_engine
from arvideo_ds.engine.checkpoints import load_checkpoint, newest_checkpoint, save_checkpoint
from arvideo_ds.engine.fragments import keep_average
from arvideo_ds.engine.world import start_world

BATCH = 12
CASES = [
    *((stage, "fp32") for stage in (0, 1, 2, 3)),
    *((stage, "bf16") for stage in (1, 2, 3)),
    # bf16 whose gradients are summed in fp32.
    *((stage, "summed") for stage in (2, 3)),
]


def make_engine(stage: int, precision: str, size: int) -> Engine:
    torch.manual_seed(0)
    # Sizes that no number of ranks divides, so that there is padding everywhere.
    model = nn.Sequential(nn.Linear(7, 33), nn.GELU(), nn.Linear(33, 5), nn.LayerNorm(5))
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": decayed, "lr": 1e-2, "weight_decay": 0.05},
        {"params": plain, "lr": 1e-2, "weight_decay": 0.0},
    ]
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": BATCH // size,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": precision != "fp32"},
        "fp16": {"enabled": False},
        "data_types": {"grad_accum_dtype": "bf16" if precision == "bf16" else "fp32"},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 10},
        "steps_per_print": 2**31,
    }
    engine = build_engine(model, groups, config, OptimSettings())
    keep_average(engine, 0.9)
    return engine


def step(engine: Engine, number: int, rank: int, size: int) -> None:
    generator = torch.Generator().manual_seed(number)
    inputs, targets = (torch.randn(BATCH, n, generator=generator) for n in (7, 5))
    dtype = next(engine.module.parameters()).dtype
    outputs = engine.forward(inputs[rank::size].to(dtype)).float()
    engine.backward((outputs - targets[rank::size]).square().mean())
    engine.step()


def main() -> None:
    action, root = sys.argv[-2], Path(sys.argv[-1])
    world = start_world()
    for saved in CASES:
        source = root / "source" / f"{saved[0]}-{saved[1]}"
        targets = [saved] if action == "save" else [c for c in CASES if c[1] == saved[1]]
        for stage, precision in targets:
            engine = make_engine(stage, precision, world.size)
            target = source
            if action == "save":
                for number in range(3):
                    step(engine, number, world.rank, world.size)
                save_checkpoint(engine, target, 3, {}, keep=9)
            else:
                checkpoint = newest_checkpoint(source)
                assert checkpoint is not None
                load_checkpoint(engine, checkpoint)
                target = root / f"{saved[0]}-{saved[1]}-to-{stage}-by-{world.size}"
                save_checkpoint(engine, target, 3, {}, keep=9)
            step(engine, 3, world.rank, world.size)
            save_checkpoint(engine, target / "next", 4, {}, keep=9)
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
