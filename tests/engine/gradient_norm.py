"""Run by test_gradient_norm.py under `deepspeed`: our norms and refusals beside DeepSpeed's own.

Prints one line of JSON: for each stage and precision the norms, and for each wrong gradient on the
last rank whether either finds it; and how far sums over micro-batches are from exact ones.
"""

from __future__ import annotations

import functools
import json
import math
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.utils import combine_grad_norm_groups, get_global_norm_of_tensors
from deepspeed.utils import safe_get_full_grad

from arvideo_ds.config.load import validate
from arvideo_ds.config.schema import OptimSettings
from arvideo_ds.data.loader import Batch
from arvideo_ds.engine.build import Engine, build_engine
from arvideo_ds.engine.resolve import resolve
from arvideo_ds.engine.world import World, start_world
from arvideo_ds.optim.groups import parameter_groups
from arvideo_ds.planning.plan import make_plan
from arvideo_ds.tasks.pretrain import Pretrain

RECIPE = validate(
    {
        "model": {"size": "tiny"},
        "objective": {"cluster": [2, 2, 2]},
        "data": {"frames": 4, "size": 16},
        "train": {"total_batch": 4, "micro_batch": 2, "max_steps": 1},
    },
    "norms",
)
WRONG = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def build(stage: int, precision: str) -> Engine:
    torch.manual_seed(0)
    task = Pretrain(RECIPE)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.02,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": False},
        "zero_optimization": {"stage": stage},
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
    return build_engine(task, parameter_groups(task, 0.05), config, OptimSettings())


def batch_of(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    clips = torch.randint(
        256, (2, *RECIPE.geometry.clip, 3), dtype=torch.uint8, generator=generator
    )
    keys = torch.arange(2)
    return Batch(clips, keys, keys, torch.ones(2, dtype=torch.bool))


def ours(engine: Engine) -> float:
    """The norm, infinity where the step would be refused."""
    optimizer = engine.deepspeed.optimizer
    if engine.stage == 0:
        engine.step()
        return math.inf if engine.refused().item() else float(engine.gradient_norm() or 0)
    if engine.stage == 3:
        return float(norm_of(optimizer))
    # In fp32 DeepSpeed takes the norm without a check before it.
    alone = float(optimizer.scaled_global_norm())
    refused = optimizer.has_overflow()
    assert float(optimizer.scaled_global_norm()) == alone
    assert refused == math.isinf(alone)
    return alone


def norm_of(optimizer: Any) -> torch.Tensor:
    return combine_grad_norm_groups(optimizer._get_norm_groups())


def deepspeeds(engine: Engine) -> float:
    """The same by the methods of DeepSpeed's classes, that ours replace."""
    optimizer, kind = engine.deepspeed.optimizer, type(engine.deepspeed.optimizer)
    if engine.stage == 0:
        norm = float(get_global_norm_of_tensors(gradients(engine)))
        return norm if math.isfinite(norm) and norm >= 0 else math.inf
    if engine.stage == 3:
        return float(combine_grad_norm_groups(kind._get_norm_groups(optimizer)))
    assert kind.has_overflow is not optimizer.has_overflow
    if kind.has_overflow(optimizer):
        return math.inf
    return float(kind.scaled_global_norm(optimizer))


def gradients(engine: Engine) -> list[torch.Tensor]:
    if engine.stage == 0:
        return [p.grad for p in engine.module.parameters() if p.grad is not None]
    return [g for group in engine.deepspeed.optimizer.averaged_gradients.values() for g in group]


def compare(stage: int, precision: str, world: World) -> dict[str, list[float]]:
    found = {}
    for wrong in ["", *WRONG]:
        engine = build(stage, precision)
        engine.backward(engine.forward(batch_of(world.rank).to(world.device)))
        # At stage 0 gradients are equal on all ranks.
        if wrong and (stage == 0 or world.rank == world.size - 1):
            gradients(engine)[-1].view(-1)[-1] = WRONG[wrong]
        theirs = deepspeeds(engine)
        found[wrong] = [ours(engine), theirs]
        engine.deepspeed.destroy()
    return found


def add_to(total: torch.Tensor, gradient: torch.Tensor) -> None:
    total.add_(gradient)


def distance_of_sum(stage: int, grad_dtype: str, world: World) -> float:
    """Of an accumulated gradient from the exact sum of all ranks' bf16 gradients, relative."""
    settings = {"precision": "bf16", "grad_dtype": grad_dtype, "total_batch": 32}
    recipe = RECIPE.model_copy(update={"train": RECIPE.train.model_copy(update=settings)})
    plan = make_plan(recipe, world_size=world.size, num_videos=32)
    config = resolve({"zero_optimization": {"stage": stage}}, recipe, plan, "sums")
    torch.manual_seed(0)
    task = Pretrain(recipe)
    exact = [torch.zeros(p.shape, dtype=torch.float64) for p in task.parameters()]
    engine = build_engine(task, parameter_groups(task, 0.05), config, OptimSettings())
    parameters = list(task.parameters())
    for parameter, total in zip(parameters, exact, strict=True):
        parameter.register_hook(functools.partial(add_to, total))
    for micro_step in range(plan.accumulation):
        engine.backward(engine.forward(batch_of(world.rank * plan.accumulation + micro_step)))
        if micro_step < plan.accumulation - 1:
            engine.step()
    found = torch.cat([safe_get_full_grad(p).flatten().double() for p in parameters])
    reference = torch.cat([total.flatten() for total in exact]) / world.size
    dist.all_reduce(reference)
    engine.deepspeed.destroy()
    return float((found - reference).norm() / reference.norm())


def main() -> None:
    world = start_world()
    found = {
        f"{stage} {precision}": compare(stage, precision, world)
        for stage in (0, 1, 2, 3)
        for precision in ("fp32", "bf16")
        if stage or precision == "fp32"
    }
    sums = {
        f"{stage} {grad_dtype}": distance_of_sum(stage, grad_dtype, world)
        for stage in (1, 2, 3)
        for grad_dtype in ("fp32", "bf16")
    }
    gathered: list[Any] = [None] * world.size
    dist.all_gather_object(gathered, {"norms": found, "sums": sums})
    if world.is_main:
        print("RESULT " + json.dumps(gathered), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
