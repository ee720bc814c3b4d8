"""Peak memory of training steps and what the adviser predicts, for a test.

    python tests/benchmark/measure_peak.py CASES.json

CASES: [{"deepspeed": JSON, "micro_batch": 2, "accumulation": 2, "recipe": [NAME, OVERRIDE, ...]}].
Builds each model with the project's engine, makes two steps on random clips and prints the most
bytes that tensors held over those predicted.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from arvideo_ds.benchmark.step import free, random_batch
from arvideo_ds.config import FinetuneRecipe, Recipe, load_recipe
from arvideo_ds.engine.build import build_engine
from arvideo_ds.engine.peak import Peak
from arvideo_ds.engine.resolve import resolve
from arvideo_ds.engine.world import start_world
from arvideo_ds.optim.groups import parameter_groups
from arvideo_ds.planning.memory import Strategy, footprint
from arvideo_ds.planning.plan import make_plan
from arvideo_ds.tasks.finetune import Finetune
from arvideo_ds.tasks.pretrain import Pretrain

# One step makes AdamW's moments, so the second is the first of the usual size.
STEPS = 2


def predicted_over_measured(case: dict[str, Any], device: torch.device) -> float:
    predicted, measured = peaks(case, device)
    return predicted / measured


def peaks(case: dict[str, Any], device: torch.device) -> tuple[int, int]:
    """Predicted and measured bytes."""
    micro_batch, accumulation = case["micro_batch"], case.get("accumulation", 1)
    clips = micro_batch * accumulation
    batch = [f"train.total_batch={clips}", f"train.micro_batch={micro_batch}"]
    name, *overrides = case["recipe"]
    recipe: Any = load_recipe(name, [*overrides, *batch], Recipe)
    plan = make_plan(recipe, world_size=1, num_videos=clips)
    config = resolve(case["deepspeed"], recipe, plan, "CASES")
    free(device)
    # DeepSpeed (0.19.8) keeps the weights of a ZeRO-3 engine that was ended.
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    with Peak(device) as peak:
        torch.manual_seed(recipe.train.seed)
        task: Pretrain | Finetune
        if isinstance(recipe, FinetuneRecipe):
            task = Finetune(recipe, recipe.finetune.num_classes or 1)
        else:
            task = Pretrain(recipe)
        groups = parameter_groups(task, recipe.optim.weight_decay)
        engine = build_engine(task, groups, config, recipe.optim)
        for _ in range(STEPS):
            clips_of_step = random_batch(recipe, micro_batch, device)
            for _ in range(accumulation):
                engine.backward(engine.forward(clips_of_step))
                engine.step()
    engine.deepspeed.destroy()
    predicted = footprint(
        recipe,
        Strategy.from_json(config),
        world_size=1,
        micro_batch=micro_batch,
        accumulation=accumulation,
    )
    return predicted.peak, peak.bytes - before


if __name__ == "__main__":
    cases = json.loads(Path(sys.argv[1]).read_text())
    device = start_world().device
    print("ratios", json.dumps([predicted_over_measured(case, device) for case in cases]))
    torch.distributed.destroy_process_group()
