"""Bytes that DeepSpeed really holds: what a rank owns at the instants of a step, for a test.

    deepspeed --num_gpus N tests/engine/measure_model_states.py CASES.json

CASES: [{"stage": 2, "precision": "bf16", "zero": {...}, "recipe": [NAME, OVERRIDE, ...]}, ...].
Builds each with the project's engine, makes two steps and walks over all live tensors in the
second: before its last forward pass ("held"), after that ("forward") and after its backward pass
("backward"), within AdamW's update ("update") and after it ("rest"). A storage counts once and
belongs to the first of parameters, optimizer, gradients (gradients, buckets and whatever else
lives). What goes through DeepSpeed's collectives in that step is counted too. Prints for each rank
and case {"held": bytes by owner, ..., "sent": bytes}.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.comm.torch import TorchBackend
from torch.utils._pytree import tree_leaves

from arvideo_ds.config import load_recipe
from arvideo_ds.config.schema import OptimSettings
from arvideo_ds.data.loader import Batch
from arvideo_ds.engine.build import Engine, build_engine
from arvideo_ds.engine.resolve import read_deepspeed_json, resolve
from arvideo_ds.engine.world import start_world
from arvideo_ds.optim.groups import parameter_groups
from arvideo_ds.planning.plan import make_plan
from arvideo_ds.tasks.pretrain import Pretrain

ROOT = Path(__file__).parent.parent.parent
STEPS = 2
# How often a ring passes its whole data on.
PASSES = {
    "all_reduce": 2,
    "reduce_scatter_tensor": 1,
    "all_gather_into_tensor": 1,
    "all_gather_coalesced": 1,
}
Storages = dict[int, int]  # address -> bytes


def storages(tensors: Any) -> Storages:
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.data_ptr():
            found[storage.data_ptr()] = storage.nbytes()
    return found


def alive() -> list[torch.Tensor]:
    gc.collect()
    found = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    return [tensor for tensor in found if not tensor.is_meta]


def size(found: Storages, without: Storages) -> int:
    return sum(bytes_ for address, bytes_ in found.items() if address not in without)


def masters(optimizer: Any) -> list[torch.Tensor]:
    """What AdamW updates; asked for before the first step, ZeRO moves it about within one."""
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    return [p for group in optimizer.param_groups for p in group["params"]]


class Owners:
    """Sorts this rank's live bytes by owner."""

    def __init__(self, engine: Engine, foreign: Storages) -> None:
        optimizer = engine.deepspeed.optimizer
        self.inner = getattr(optimizer, "optimizer", optimizer)
        self._parameters = list(engine.module.parameters())
        self._masters = masters(optimizer)
        self._foreign = foreign

    def bytes(self) -> dict[str, int]:
        parts = [p.ds_tensor for p in self._parameters if hasattr(p, "ds_tensor")]
        weights = storages([*self._parameters, *parts])
        moments = [s for state in self.inner.state.values() for s in state.values()]
        optimizer = storages([*self._masters, *filter(torch.is_tensor, moments)])
        gradients = storages([p.grad for p in self._parameters if p.grad is not None])
        return {
            "parameters": size(weights, self._foreign),
            "optimizer": size(optimizer, {**self._foreign, **weights}),
            "gradients": size(
                {**storages(alive()), **gradients}, {**self._foreign, **weights, **optimizer}
            ),
        }


class Sent:
    """Counts what a ring would send for this rank, at the collectives of DeepSpeed's backend."""

    def __init__(self) -> None:
        self.bytes = 0.0
        for name, passes in PASSES.items():
            setattr(TorchBackend, name, self._counted(getattr(TorchBackend, name), passes))

    def _counted(self, collective: Any, passes: int) -> Any:
        def call(backend: Any, *args: Any, **kwargs: Any) -> Any:
            # Input and output: the larger is the whole.
            whole = max(sum(t.nbytes for t in tensors(part)) for part in (*args, *kwargs.values()))
            size = dist.get_world_size()
            self.bytes += passes * whole * (size - 1) / size
            return collective(backend, *args, **kwargs)

        return call


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def measure(case: dict[str, Any], sent: Sent) -> dict[str, Any]:
    # As tensors: if one were freed meanwhile, its address could become that of a weight.
    before = alive()
    # What the imports made is no part of any walk, which takes a tenth of the time then.
    gc.freeze()
    torch.manual_seed(0)
    name, *overrides = case["recipe"]
    recipe = load_recipe(name, [*overrides, f"train.precision={case['precision']}"])
    plan = make_plan(recipe, world_size=dist.get_world_size())
    tree = read_deepspeed_json(ROOT / "ds_configs" / f"zero{case['stage']}.json")
    tree["zero_optimization"].update(case.get("zero", {}))
    tree["zero_force_ds_cpu_optimizer"] = False
    task = Pretrain(recipe)
    groups = parameter_groups(task, 0.05)
    engine = build_engine(task, groups, resolve(tree, recipe, plan, "case"), OptimSettings())
    clips = torch.zeros((plan.micro_batch, *recipe.geometry.clip, 3), dtype=torch.uint8)
    count = torch.arange(plan.micro_batch)
    batch = Batch(clips, count, count, torch.ones(plan.micro_batch, dtype=torch.bool))
    foreign = {
        **storages(before),
        **storages(task.buffers()),
        **storages([clips, count, batch.valid]),
    }
    owners = Owners(engine, foreign)
    seen: dict[str, Any] = {}

    def update(*_: Any) -> None:
        # ZeRO updates group by group; the largest moment counts.
        seen["update"] = max(owners.bytes(), seen.get("update", {}), key=lambda b: sum(b.values()))

    hook = owners.inner.register_step_pre_hook(update)
    micro_steps = STEPS * plan.accumulation
    for micro_step in range(1, micro_steps + 1):
        last = micro_step == micro_steps
        if micro_step == micro_steps - plan.accumulation + 1:
            sent.bytes = 0
        if last:
            seen = {"held": owners.bytes()}
        loss = engine.forward(batch)
        if last:
            seen["forward"] = owners.bytes()
        engine.backward(loss)
        if last:
            dist.barrier()  # what is still being sent lives too
            seen["backward"] = owners.bytes()
        engine.step()
    seen |= {"sent": sent.bytes, "rest": owners.bytes()}
    hook.remove()
    engine.deepspeed.destroy()
    return seen


def main() -> None:
    cases = json.loads(Path(sys.argv[-1]).read_text())
    sent = Sent()
    world = start_world()
    gathered: list[Any] = [None] * world.size
    dist.all_gather_object(gathered, [measure(case, sent) for case in cases])
    if world.is_main:
        print("RESULT " + json.dumps(gathered), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
