"""Run by test_sequence.py: every case on one rank, then on 2 and 4 that share tokens.

    sequence.py FOLDER [RANKS]

Writes to FOLDER the curves of all cases by name, and checkpoints after the first and last step; on
no more than RANKS. Ranks are forked, so that torch and DeepSpeed are imported once; on GPUs they
are started anew, as CUDA does not survive a fork.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from arvideo_ds.config import FinetuneRecipe, PretrainRecipe, Recipe, load_recipe
from arvideo_ds.config.load import validate
from arvideo_ds.config.schema import OptimSettings
from arvideo_ds.data.loader import Batch
from arvideo_ds.data.order import rank_positions
from arvideo_ds.engine.agreement import gather_over_ranks
from arvideo_ds.engine.build import build_engine
from arvideo_ds.engine.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from arvideo_ds.engine.peak import LiveBytes
from arvideo_ds.engine.resolve import resolve
from arvideo_ds.engine.sequence import share_tokens
from arvideo_ds.engine.world import World, start_world
from arvideo_ds.optim.groups import parameter_groups
from arvideo_ds.planning.memory import Strategy, activations
from arvideo_ds.planning.plan import RunPlan, make_plan
from arvideo_ds.tasks.finetune import Finetune
from arvideo_ds.tasks.pretrain import Pretrain, build_objective

STEPS, BATCH, CLASSES, CODES = 3, 4, 3, 512
SETTINGS = {"mixup": 0, "cutmix": 0, "drop_path": 0.2}
# Encoded tokens: 6, 4, 9, 32 and 18, so that ranks get as many, unlike ones, or none but filling.
TASKS: dict[str, dict[str, Any]] = {
    "arvideo": {"objective": {"cluster": [2, 2, 2]}, "decoder": {"depth": 1}},
    "videomae": {"objective": {"name": "videomae"}, "decoder": {"depth": 1}},
    "lvmae": {
        "objective": {"name": "lvmae", "mask_ratio": 0.8, "latent_levels": [8, 8, 8]},
        "decoder": {"depth": 1},
        "data": {"frames": 6},
    },
    "finetune": {"task": "finetune", "finetune": SETTINGS},
    "heads": {
        "task": "finetune",
        "finetune": {
            **SETTINGS,
            "heads": ["verb", "noun"],
            "drop_tokens": 0.4,
            "pooling": "attention",
        },
    },
}
# Recipes whose activations are counted.
WHOLE = {"arvideo": "demo", "videomae": "videomae_demo"}
# Stage, task, recomputation, micro-batch, whether it goes on from another run's first step.
CASES = [
    (0, "arvideo", False, BATCH, False),
    (1, "arvideo", False, 1, False),
    (2, "arvideo", True, BATCH, False),
    (3, "arvideo", False, BATCH, False),
    (2, "videomae", True, BATCH, False),
    (3, "videomae", True, BATCH, True),
    (1, "lvmae", False, BATCH, False),
    (3, "lvmae", True, BATCH, False),
    # Each clip alone, so that the same paths drop out however the clips are dealt.
    (0, "finetune", False, 1, False),
    (2, "heads", True, 1, False),
]
# Ranks -> sizes of sequence groups.
WORLDS = {1: (1,), 2: (2,), 4: (2, 4, 1)}
# Those that go on do so from the first step of this case, where ranks had shared tokens otherwise.
FIRST = (2, "videomae", True, BATCH, False)
BEFORE = {"2-of-2": "1-of-1", "2-of-4": "2-of-2", "4-of-4": "2-of-4", "1-of-4": "4-of-4"}
# Its video does not decode on the last rank of its group.
FAILING = 5


def recipe_of(task: str, micro_batch: int) -> Recipe:
    data = {"frames": 4, "size": 16, "num_videos": 100, "num_streams": 4}
    tree = {
        **TASKS[task],
        "model": {"size": "tiny"},
        "data": {**data, **TASKS[task].get("data", {})},
        "optim": {"warmup_steps": 0},
        "train": {
            "total_batch": BATCH,
            "micro_batch": micro_batch,
            "max_steps": STEPS,
            "precision": "fp32",
        },
    }
    return validate(tree, "sequence", Recipe)


def task_of(recipe: Recipe) -> nn.Module:
    if isinstance(recipe, FinetuneRecipe):
        return Finetune(recipe, *[CLASSES] * num_heads(recipe))
    assert isinstance(recipe, PretrainRecipe)
    return Pretrain(recipe)


def num_heads(recipe: Recipe) -> int:
    return len(recipe.finetune.heads or "1") if isinstance(recipe, FinetuneRecipe) else 1


def batch_of(recipe: Recipe, plan: RunPlan, positions: list[int], rank: int) -> Batch:
    clips, scores, codes = [], [], []
    count = recipe.geometry.num_tokens
    for position in positions:
        generator = torch.Generator().manual_seed(position)
        clips.append(torch.randint(0, 256, (*recipe.geometry.clip, 3), generator=generator))
        scores.append(torch.rand(count, generator=generator))
        codes.append(torch.randint(0, CODES, (count,), generator=generator))
    keys = torch.tensor(positions)
    valid = torch.ones_like(keys, dtype=torch.bool)
    # Losses are means over a micro-batch's valid clips: comparable where each clip is alone.
    if recipe.train.micro_batch == 1 and (rank + 1) % plan.sequence_parallel == 0:
        valid = keys != FAILING
        clips = [c if ok else torch.zeros_like(c) for c, ok in zip(clips, valid, strict=True)]
    heads = num_heads(recipe)
    labels = keys % CLASSES if heads == 1 else (keys[:, None] + torch.arange(heads)) % CLASSES
    return Batch(
        torch.stack(clips).to(torch.uint8),
        keys,
        labels,
        valid,
        first_key=positions[0],
        scores=torch.stack(scores),
        codes=torch.stack(codes),
    )


def curve(case: tuple[int, str, bool, int, bool], size: int, world: World, root: Path) -> list[Any]:
    stage, name, recompute, micro_batch, resumed = case
    recipe = recipe_of(name, micro_batch)
    plan = make_plan(recipe, world_size=world.size, sequence_parallel=size)
    tree = {
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 1000},
        "sequence_parallel_size": size,
        **({"activation_checkpointing": {}} if recompute else {}),
    }
    torch.manual_seed(0)
    task = task_of(recipe)
    config = resolve(tree, recipe, plan, "sequence")
    engine = build_engine(task, parameter_groups(task, 0.05), config, OptimSettings())
    engine.set_learning_rate(1e-3)
    first, losses, groups = 0, [], f"{size}-of-{world.size}"
    if resumed and groups in BEFORE:
        source = root / BEFORE[groups] / name_of(FIRST) / "step-00000001"
        facts = json.loads((source / "run.json").read_text())
        load_checkpoint(engine, Checkpoint(source, 1, facts))
        first = 1
    batches = rank_positions(plan, rank=world.rank, first_step=first)
    for step in range(first, STEPS):
        total = 0.0
        for _ in range(plan.accumulation):
            batch = batch_of(recipe, plan, next(batches), world.rank).to(world.device)
            loss = engine.forward(batch)
            engine.backward(loss)
            engine.step()
            total += float(loss.detach()) / plan.accumulation
        losses.append(total)
        if step in (0, STEPS - 1):
            save_checkpoint(engine, root / groups / name_of(case), step + 1, {}, keep=9)
    ranks = gather_over_ranks(losses, world.device)
    return [sum(values) / len(values) for values in zip(*ranks, strict=True)]


def kept_bytes(objective: str, group: int) -> tuple[int, int]:
    """What a forward pass leaves alive on this rank, and what the adviser says it does."""
    recipe = load_recipe(WHOLE[objective], ["train.precision=fp32"])
    model = build_objective(recipe)
    share_tokens(model, group)
    clips = torch.zeros((2, *recipe.geometry.clip, 3), dtype=torch.uint8)
    with LiveBytes() as live:
        loss = model(clips, torch.arange(2)).sum()
        kept = live.now
    loss.backward()
    return kept, activations(recipe, 2, Strategy(sequence_parallel=group)).saved


def name_of(case: tuple[Any, ...]) -> str:
    return "-".join(map(str, case))


def rank_main(rank: int, size: int, port: int, groups: tuple[int, ...], root: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_PORT=str(port))
    os.environ.update(WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1")
    world = start_world()
    curves = {
        f"{group}-of-{size}/{name_of(case)}": curve(case, group, world, root)
        for group in groups
        for case in CASES
        # Ranks that share nothing are there for what goes on from those that did.
        if size == 1 or group > 1 or case[-1]
    }
    counted = size > 1 and world.device.type == "cpu"
    kept = {name: kept_bytes(name, max(groups)) for name in WHOLE} if counted else {}
    if world.is_main:
        (root / f"curves-{size}.json").write_text(json.dumps(curves))
        (root / f"kept-{size}.json").write_text(json.dumps(kept))
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> int:
    on_cpu = os.environ.get("DS_ACCELERATOR") == "cpu"
    root, context = Path(sys.argv[1]), multiprocessing.get_context("fork" if on_cpu else "spawn")
    largest = int(sys.argv[2]) if len(sys.argv) > 2 else max(WORLDS)
    for size, groups in WORLDS.items():
        if size > largest:
            break
        port = free_port()
        ranks = [
            context.Process(target=rank_main, args=(rank, size, port, groups, root))
            for rank in range(size)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
