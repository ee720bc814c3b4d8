"""Launches and waits of whole engine steps on the imaginary GPU, for test_fakecuda.py.

    python tests/fakecuda/steps.py CASES.json

CASES: [{"recipe": [NAME, OVERRIDE, ...], "micro_batch": 8, "stage": 1}, ...]. Prints a line of JSON
for each: kernels and waits of forward, backward and step in the last of some steps.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from arvideo_ds.benchmark.step import random_batch
from arvideo_ds.config import load_recipe
from arvideo_ds.engine.build import build_engine
from arvideo_ds.engine.fragments import keep_average
from arvideo_ds.engine.resolve import resolve
from arvideo_ds.engine.world import start_world
from arvideo_ds.optim.groups import parameter_groups
from arvideo_ds.planning.plan import make_plan
from arvideo_ds.tasks.pretrain import Pretrain
from tests.fakecuda import counts

STEPS = 3


def measure(case: dict[str, Any]) -> dict[str, Any]:
    size, accumulation = case["micro_batch"], case.get("accumulation", 1)
    name, *overrides = case["recipe"]
    batches = [f"train.total_batch={size * accumulation}", f"train.micro_batch={size}"]
    recipe = load_recipe(name, [*overrides, *batches])
    plan = make_plan(recipe, world_size=1, num_videos=size * accumulation)
    tree = {"zero_optimization": {"stage": case["stage"]}, **case.get("deepspeed", {})}
    config = resolve(tree, recipe, plan, "case")
    task = Pretrain(recipe)
    groups = parameter_groups(task, recipe.optim.weight_decay)
    engine = build_engine(task, groups, config, recipe.optim, compiled=recipe.train.compile)
    if case.get("average"):
        keep_average(engine, 0.999)
    batch = random_batch(recipe, size, torch.device("cuda"))
    parts: dict[str, dict[str, int]] = {}
    for _ in range(STEPS):
        parts = {}
        engine.set_learning_rate(1e-4)
        for _ in range(accumulation):
            counts.reset()
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
    optimizer = type(engine.deepspeed.optimizer).__name__
    engine.deepspeed.destroy()
    return {**parts, "optimizer": optimizer}


def main() -> None:
    counts.prepare()
    start_world()
    for case in json.loads(Path(sys.argv[1]).read_text()):
        print("RESULT " + json.dumps(measure(case)), flush=True)


if __name__ == "__main__":
    main()
