"""Launches and waits of whole engine steps on the imaginary GPU, for test_fakecuda.py.

    python tests/fakecuda/steps.py CASES.json

CASES: [{"recipe": [NAME, OVERRIDE, ...], "micro_batch": 8, "stage": 1}, ...]. Prints a line of JSON
for each: kernels and waits of forward, backward and step in the last of some steps, graphs compiled
until each of them, graph breaks, and attention kernels.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.utils as dynamo

from arvideo_ds.benchmark.step import random_batch
from arvideo_ds.config import FinetuneRecipe, Recipe, load_recipe
from arvideo_ds.engine.attention import chosen_kernels, preferred_kernels
from arvideo_ds.engine.build import build_engine, can_compile
from arvideo_ds.engine.fragments import keep_average
from arvideo_ds.engine.resolve import compiles, resolve
from arvideo_ds.engine.world import start_world
from arvideo_ds.optim.groups import parameter_groups
from arvideo_ds.planning.plan import make_plan
from arvideo_ds.tasks.finetune import Finetune
from arvideo_ds.tasks.pretrain import Pretrain
from tests.fakecuda import counts

STEPS = 3


def measure(case: dict[str, Any]) -> dict[str, Any]:
    size, accumulation = case["micro_batch"], case.get("accumulation", 1)
    name, *overrides = case["recipe"]
    batches = [f"train.total_batch={size * accumulation}", f"train.micro_batch={size}"]
    recipe: Any = load_recipe(name, [*overrides, *batches], Recipe)
    plan = make_plan(recipe, world_size=1, num_videos=size * accumulation)
    tree = {"zero_optimization": {"stage": case["stage"]}, **case.get("deepspeed", {})}
    config = resolve(tree, recipe, plan, "case")
    task = Finetune(recipe, 10) if isinstance(recipe, FinetuneRecipe) else Pretrain(recipe)
    groups = parameter_groups(task, recipe.optim.weight_decay)
    compiled = compiles(recipe, config, able=can_compile(torch.device("cuda")))
    engine = build_engine(task, groups, config, recipe.optim, compiled=compiled)
    if case.get("average"):
        keep_average(engine, 0.999)
    batch = random_batch(recipe, size, torch.device("cuda"))
    parts: dict[str, Any] = {}
    dynamo.counters.clear()
    graphs = []
    for _ in range(STEPS):
        parts = {}
        engine.set_learning_rate(1e-4)
        for _ in range(accumulation):
            counts.reset()
            with preferred_kernels(recipe, batch.clips.device):
                loss = engine.forward(batch)
            parts["forward"] = counts.summary()
            counts.reset()
            engine.backward(loss)
            parts["backward"] = counts.summary()
            counts.reset()
            engine.step()
            engine.refused()
            parts["step"] = counts.summary()
            if case.get("detail"):
                parts["events"] = counts.events()
        graphs.append(dynamo.counters["stats"]["unique_graphs"])
    optimizer = type(engine.deepspeed.optimizer).__name__
    engine.deepspeed.destroy()
    parts |= {"graphs": graphs, "graph_breaks": len(dynamo.counters["graph_break"])}
    with preferred_kernels(recipe, batch.clips.device):
        parts["attention"] = chosen_kernels(recipe, plan, batch.clips.device)
    return {**parts, "optimizer": optimizer}


def main() -> None:
    counts.prepare()
    start_world()
    for case in json.loads(Path(sys.argv[1]).read_text()):
        print("RESULT " + json.dumps(measure(case)), flush=True)


if __name__ == "__main__":
    main()
