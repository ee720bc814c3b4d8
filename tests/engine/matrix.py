"""Run by test_matrix.py under `deepspeed`: a tiny ARVideo, every way of running it.

Prints one line of JSON: the curve of each case, by name.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from arvideo_ds.config import PretrainRecipe
from arvideo_ds.config.load import validate
from arvideo_ds.config.schema import OptimSettings
from arvideo_ds.config.teachers import EMA
from arvideo_ds.data.loader import Batch
from arvideo_ds.engine.agreement import gather_over_ranks
from arvideo_ds.engine.build import build_engine
from arvideo_ds.engine.fragments import follow_average, keep_average
from arvideo_ds.engine.world import World, start_world
from arvideo_ds.evaluation.pretrained import build_objective
from arvideo_ds.files.tensors import save_tensors
from arvideo_ds.models.teacher import Teacher
from arvideo_ds.optim.groups import parameter_groups
from arvideo_ds.runs import run_folder
from arvideo_ds.tasks.pretrain import Pretrain
from arvideo_ds.tasks.teacher import settle_teacher

# make test does a few; the figure over 50 steps is ARVIDEO_STEPS=50.
STEPS, BATCH = int(os.environ.get("ARVIDEO_STEPS", "5")), 8
TREE: dict[str, Any] = {
    "model": {"size": "tiny"},
    "objective": {"cluster": [2, 2, 2]},
    "decoder": {"depth": 1},
    "data": {"frames": 4, "size": 16},
    "train": {
        "total_batch": BATCH,
        "micro_batch": BATCH,
        "max_steps": STEPS,
        "precision": "fp32",  # of a teacher
    },
}
RECIPE = validate(TREE, "matrix")
CASES = [
    (stage, precision, accumulation, checkpointing, False)
    for stage, precision, accumulation, checkpointing in itertools.product(
        (0, 1, 2, 3), ("fp32", "bf16"), (1, 4), (False, True)
    )
    if precision == "fp32" or (stage and checkpointing == (accumulation == 4))
] + [
    (stage, precision, 1, False, True)
    for stage, precision in itertools.product((2, 3), ("fp32", "bf16"))
]


def config(
    stage: int, precision: str, accumulation: int, *, checkpointing: bool, offload: bool
) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": BATCH // dist.get_world_size() // accumulation,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": False},
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        **({"activation_checkpointing": {}} if checkpointing else {}),
    }


def batches(step: int, accumulation: int, world: World) -> list[Batch]:
    """This rank's micro-batches: together the same clips of a step, however they are dealt."""
    generator = torch.Generator().manual_seed(step)
    # Something to learn: each clip one brightness.
    level = torch.randint(0, 256, (BATCH, 1, 1, 1, 1), generator=generator)
    noise = torch.randint(-40, 40, (BATCH, *RECIPE.geometry.clip, 3), generator=generator)
    clips = (level + noise).clamp(0, 255).to(torch.uint8)
    mine = torch.arange(BATCH)[world.rank :: world.size].chunk(accumulation)
    micro_batches = [
        Batch(clips[n], 1000 * step + n, torch.zeros_like(n), torch.ones_like(n, dtype=torch.bool))
        for n in mine
    ]
    return [batch.to(world.device) for batch in micro_batches]


def curve(
    case: tuple[int, str, int, bool, bool], world: World, recipe: PretrainRecipe = RECIPE
) -> list[float]:
    stage, precision, accumulation, checkpointing, offload = case
    torch.manual_seed(0)
    task = Pretrain(recipe)
    before = [] if task.teacher is None else copy.deepcopy(list(weights_of(task.teacher)))
    settings = config(stage, precision, accumulation, checkpointing=checkpointing, offload=offload)
    engine = build_engine(task, parameter_groups(task, 0.05), settings, OptimSettings())
    if recipe.teacher == EMA:
        before = []
        keep_average(engine, recipe.ema_decay or 0)
        follow_average(engine, task.followers())
        expected = copy.deepcopy(dict(task.named_parameters())) if stage == 0 else {}
    engine.set_learning_rate(1e-3)
    losses = []
    for step in range(STEPS):
        total = 0.0
        for batch in batches(step, accumulation, world):
            loss = engine.forward(batch)
            engine.backward(loss)
            engine.step()
            total += float(loss.detach()) / accumulation
        losses.append(total)
        if recipe.teacher == EMA and stage == 0:
            for name, weight in task.named_parameters():
                expected[name].data.lerp_(weight.data, 1 - (recipe.ema_decay or 0))
            for name, follower in task.followers().items():
                torch.testing.assert_close(follower.data, expected[name].data)
    if before:
        assert all(map(torch.equal, before, weights_of(task.teacher))), "frozen, and whole"
    ranks = gather_over_ranks(losses, world.device)
    return [sum(values) / len(values) for values in zip(*ranks, strict=True)]


def weights_of(teacher: Teacher) -> Iterator[torch.Tensor]:
    return iter(teacher.model.state_dict().values())


def taught(folder: Path) -> PretrainRecipe:
    """The recipe with an untrained teacher, which is written to the folder."""
    torch.manual_seed(1)
    save_tensors(build_objective(RECIPE).state_dict(), folder / run_folder.MODEL)
    run_folder.write_recipe(folder, RECIPE)
    objective = {**TREE["objective"], "teacher": str(folder)}
    return settle_teacher(validate({**TREE, "objective": objective}, "taught"))


def main() -> None:
    world = start_world()
    curves = {"-".join(map(str, case)): curve(case, world) for case in CASES}
    with tempfile.TemporaryDirectory() as folder:
        recipe = taught(Path(folder))
        for stage in range(4):
            case = (stage, "fp32", 1, False, False)
            curves[f"{stage}-fp32-taught"] = curve(case, world, recipe)
    objective = {**TREE["objective"], "teacher": EMA, "teacher_decay": 0.9}
    recipe = settle_teacher(validate({**TREE, "objective": objective}, "ema"))
    for stage in range(4):
        curves[f"{stage}-fp32-ema"] = curve((stage, "fp32", 1, False, False), world, recipe)
    if world.is_main:
        print("RESULT " + json.dumps(curves), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
