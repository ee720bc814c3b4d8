"""Run by test_layer_rates.py under `deepspeed`: what one step really moves, layer by layer.

Prints for each stage and parameter the median change of its elements over the learning rate.
"""

from __future__ import annotations

import json

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor

from arvideo_ds.config import FinetuneRecipe
from arvideo_ds.config.load import validate
from arvideo_ds.config.schema import OptimSettings
from arvideo_ds.data.loader import Batch
from arvideo_ds.engine.build import Engine, build_engine
from arvideo_ds.engine.world import start_world
from arvideo_ds.optim.groups import parameter_groups
from arvideo_ds.tasks.finetune import Finetune

RATE, DECAY, CLASSES = 1e-3, 0.5, 3
RECIPE = validate(
    {
        "task": "finetune",
        "model": {"size": "tiny"},
        "data": {"frames": 4, "size": 16},
        "train": {"total_batch": 4, "micro_batch": 2, "max_steps": 1},
        "finetune": {"drop_path": 0.0},
    },
    "layer rates",
    FinetuneRecipe,
)


def weights(engine: Engine) -> dict[str, Tensor]:
    whole = {}
    for name, parameter in engine.module.named_parameters():
        full = safe_get_full_fp32_param(parameter)
        whole[name] = (parameter if full is None else full).detach().clone().flatten()
    return whole


def moved(stage: int) -> dict[str, float]:
    torch.manual_seed(0)
    task = Finetune(RECIPE, CLASSES)
    # Not near zero: gradients would vanish against Adam's epsilon.
    torch.nn.init.normal_(task.model.head.weight)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "zero_optimization": {"stage": stage},
        "steps_per_print": 2**31,
    }
    groups = parameter_groups(task, 0.0, layer_decay=DECAY)
    engine = build_engine(task, groups, config, OptimSettings(betas=(0.9, 0.999)))
    engine.set_learning_rate(RATE)
    clips = torch.randint(0, 256, (2, 4, 16, 16, 3), dtype=torch.uint8)
    numbers = torch.arange(2)
    batch = Batch(clips, numbers, numbers, torch.ones(2, dtype=torch.bool))
    before = weights(engine)
    engine.backward(engine.forward(batch))
    engine.step()
    after = weights(engine)
    # The first step of Adam moves every element by its rate, whatever its gradient.
    return {name: float((after[name] - before[name]).abs().median()) / RATE for name in before}


def main() -> None:
    world = start_world()
    table = {str(stage): moved(stage) for stage in (0, 1, 2, 3)}
    if world.is_main:
        print("RESULT " + json.dumps(table), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
