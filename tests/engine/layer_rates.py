"""Run by test_layer_rates.py under `deepspeed` with a FOLDER: what steps really move.

Prints for each stage and parameter the median change of its elements over the learning rate; and
what a frozen encoder does at every stage and precision, with recomputation (`frozen`).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor

from arvideo_ds.config import FinetuneRecipe
from arvideo_ds.config.load import validate
from arvideo_ds.config.schema import OptimSettings
from arvideo_ds.data.loader import Batch
from arvideo_ds.engine.build import Engine, build_engine
from arvideo_ds.engine.checkpoints import (
    load_checkpoint,
    load_frozen,
    newest_checkpoint,
    save_checkpoint,
)
from arvideo_ds.engine.fragments import keep_average
from arvideo_ds.engine.saved_state import SavedState
from arvideo_ds.engine.world import start_world
from arvideo_ds.optim.groups import parameter_groups
from arvideo_ds.tasks import task_of
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


def frozen_engine(
    train: str,
    stage: int,
    precision: str,
    seed: int,
    *,
    recompute: bool = True,
    folder: Path | None = None,
) -> tuple[Engine, dict[str, Tensor]]:
    """An engine with a frozen encoder, from the newest checkpoint in a folder; its first weights.

    train: finetune.train.
    """
    settings = RECIPE.finetune.model_copy(update={"train": train})
    recipe = RECIPE.model_copy(update={"finetune": settings})
    torch.manual_seed(seed)
    task = Finetune(recipe, CLASSES)
    torch.nn.init.normal_(task.model.head.weight)
    task_of(recipe).freeze(task)
    checkpoint = None if folder is None else newest_checkpoint(folder)
    if checkpoint is not None:
        load_frozen(task, checkpoint)
    first = {name: p.detach().clone() for name, p in task.named_parameters()}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": False},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 10},
        "steps_per_print": 2**31,
        **({"activation_checkpointing": {}} if recompute else {}),
    }
    engine = build_engine(task, parameter_groups(task, 0.0), config, OptimSettings())
    keep_average(engine, 0.9)
    if checkpoint is not None:
        load_checkpoint(engine, checkpoint)
    engine.set_learning_rate(RATE)
    return engine, first


def losses(engine: Engine, steps: range) -> list[float]:
    found = []
    for step in steps:
        generator = torch.Generator().manual_seed(2 * step + dist.get_rank())
        clips = torch.randint(0, 256, (2, 4, 16, 16, 3), dtype=torch.uint8, generator=generator)
        numbers = torch.arange(2)
        loss = engine.forward(
            Batch(clips, numbers, numbers, torch.ones(2, dtype=torch.bool), first_key=step)
        )
        engine.backward(loss)
        engine.step()
        mean = loss.detach().float()
        dist.all_reduce(mean)
        found.append(float(mean))
    return found


def frozen(train: str, stage: int, precision: str, folder: Path) -> dict[str, Any]:
    """Curves with and without recomputation and of a run resumed at the next stage; the frozen
    weights that a checkpoint changed, the trained ones that did not move, the state of a frozen
    weight in the checkpoint."""
    engine, first = frozen_engine(train, stage, precision, seed=0)
    curve = losses(engine, range(3))
    save_checkpoint(engine, folder, 3, {}, keep=1)
    curve += losses(engine, range(3, 5))
    plain, _ = frozen_engine(train, stage, precision, seed=0, recompute=False)
    saved = SavedState(folder / "step-00000003")
    after, averages = saved.weights(""), saved.weights("", "average")
    trained = {name for name, p in engine.module.named_parameters() if p.requires_grad}
    same = {name for name in first if torch.equal(first[name], after[name])}
    lowest = 0 if precision == "fp32" else 1
    other_stage = max(lowest, (stage + 1) % 4)
    other, _ = frozen_engine(train, other_stage, precision, seed=1, folder=folder)
    return {
        "curve": curve,
        "plain": losses(plain, range(5)),
        "resumed": losses(other, range(3, 5)),
        "changed": sorted(first.keys() - same - trained),
        "idle": sorted(same & trained),
        "frozen_averages": all(torch.equal(averages[n], after[n]) for n in same - trained),
        "kinds": sorted({k for n, k in saved._pieces if n == "model.encoder.embed.weight"}),
    }


def main() -> None:
    world, folder = start_world(), Path(sys.argv[-1])
    table = {str(stage): moved(stage) for stage in (0, 1, 2, 3)}
    cases = [("lora", s, p) for p in ("fp32", "bf16") for s in range(4) if s or p == "fp32"]
    cases += [("head", 0, "fp32"), ("head", 1, "bf16"), ("head", 3, "fp32")]
    adapters = {"-".join(map(str, c)): frozen(*c, folder / "-".join(map(str, c))) for c in cases}
    if world.is_main:
        print("RESULT " + json.dumps({"rates": table, "frozen": adapters}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
