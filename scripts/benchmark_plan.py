#!/usr/bin/env python3
"""Peak memory of a training step beside what scripts/plan.py predicts, as JSON.

    python scripts/benchmark_plan.py                                     (ViT-B, L, H, g on one GPU)
    python scripts/benchmark_plan.py --recipes demo --micro_batch 4 train.precision=fp32      (CPU)

Builds each model and the engine of the DeepSpeed JSON, makes two steps on random clips and takes
the most that tensors held (on CUDA the allocator's count, elsewhere that of engine/peak.py). Exit
code 1 if a prediction is further off than --tolerance.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from arvideo_ds.arguments import CommandParser, add_deepspeed
from arvideo_ds.benchmark.step import random_batch
from arvideo_ds.config import FinetuneRecipe, PretrainRecipe, Recipe, load_recipe
from arvideo_ds.data.loader import Batch
from arvideo_ds.engine.build import Engine, build_engine
from arvideo_ds.engine.peak import Peak
from arvideo_ds.engine.resolve import read_deepspeed_json, resolve, sequence_parallel
from arvideo_ds.engine.world import World, start_world
from arvideo_ds.errors import UserError, command
from arvideo_ds.optim.groups import parameter_groups
from arvideo_ds.planning.memory import Strategy, footprint
from arvideo_ds.planning.plan import make_plan
from arvideo_ds.tasks.finetune import Finetune
from arvideo_ds.tasks.pretrain import Pretrain

ROOT = Path(__file__).parent.parent
RECIPES = [f"pretrain_vit_{size}_k400" for size in "blhg"]
# One step makes AdamW's moments, so the second is the first of the usual size.
STEPS = 2


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--micro_batch", type=int, default=8)
    parser.add_argument("--accumulation", type=int, default=1)
    add_deepspeed(parser, ROOT / "ds_configs" / "zero0.json")
    parser.add_argument("--tolerance", type=float, default=0.15)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args()


def measure(name: str, args: argparse.Namespace, world: World) -> dict[str, Any]:
    """Predicted and measured bytes of one recipe."""
    tree, origin = read_deepspeed_json(args.deepspeed_config), str(args.deepspeed_config)
    group = sequence_parallel(tree, origin)
    clips = args.micro_batch * args.accumulation * max(1, world.size // group)
    batch = [f"train.total_batch={clips}", f"train.micro_batch={args.micro_batch}"]
    recipe = load_recipe(name, [*args.overrides, *batch], Recipe)
    if not isinstance(recipe, PretrainRecipe | FinetuneRecipe):
        raise UserError(f"{name}: only steps of pretraining and fine-tuning are measured.")
    plan = make_plan(recipe, world_size=world.size, num_videos=clips, sequence_parallel=group)
    config = resolve(tree, recipe, plan, origin)
    peak = Peak(world.device)
    with peak:
        engine = _engine(recipe, config)
        for _ in range(STEPS):
            _step(engine, random_batch(recipe, plan.micro_batch, world.device), plan.accumulation)
    predicted = footprint(
        recipe,
        Strategy.from_json(config),
        world_size=world.size,
        micro_batch=plan.micro_batch,
        accumulation=plan.accumulation,
    )
    engine.deepspeed.destroy()
    return {
        "recipe": name,
        "micro_batch": plan.micro_batch,
        "accumulation": plan.accumulation,
        "measured_bytes": peak.bytes,
        "predicted_bytes": predicted.peak,
        "predicted": {
            "start": predicted.start,
            "forward": predicted.forward,
            "backward": predicted.backward,
            "update": predicted.update,
        },
        "predicted_over_measured": round(predicted.peak / peak.bytes, 4),
    }


def _engine(recipe: PretrainRecipe | FinetuneRecipe, config: dict[str, Any]) -> Engine:
    torch.manual_seed(recipe.train.seed)
    task: Pretrain | Finetune
    if isinstance(recipe, PretrainRecipe):
        task = Pretrain(recipe)
    else:
        task = Finetune(recipe, recipe.finetune.num_classes or 1)
    groups = parameter_groups(task, recipe.optim.weight_decay)
    return build_engine(task, groups, config, recipe.optim)


def _step(engine: Engine, batch: Batch, accumulation: int) -> None:
    for _ in range(accumulation):
        engine.backward(engine.forward(batch))
        engine.step()


@command
def main() -> int:
    args = parse_arguments()
    world = start_world()
    results = []
    for name in args.recipes:
        results.append(measure(name, args, world))
        gc.collect()
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
    ratios = [result["predicted_over_measured"] for result in results]
    within = all(abs(ratio - 1) <= args.tolerance for ratio in ratios)
    if world.is_main:
        document = {
            "device": _device_name(world.device),
            "deepspeed_config": args.deepspeed_config.name,
            "ranks": world.size,
            "overrides": args.overrides,
            "tolerance": args.tolerance,
            "within_tolerance": within,
            "results": results,
            "versions": {name: metadata.version(name) for name in ("torch", "deepspeed")},
        }
        print(json.dumps(document, indent=1))
    torch.distributed.destroy_process_group()
    return 0 if within else 1


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


if __name__ == "__main__":
    sys.exit(main())
