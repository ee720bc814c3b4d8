"""The real training step of a row on one process: built, run, timed, counted, fed."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from arvideo_ds.benchmark.rows import PAPER, Row
from arvideo_ds.benchmark.variants import attention_of, embed_all_tokens
from arvideo_ds.config import Recipe
from arvideo_ds.data.loader import Batch
from arvideo_ds.engine.build import Engine, build_engine
from arvideo_ds.engine.peak import Peak
from arvideo_ds.optim.groups import parameter_groups
from arvideo_ds.tasks.pretrain import Pretrain
from arvideo_ds.train.metrics import Stopwatch

# One step makes AdamW's moments, so the second is the first of the usual size.
_STEPS_TO_THE_PEAK = 2


class Clock:
    """Time of the parts of steps: forward, backward, optimiser."""

    def __init__(self, device: torch.device) -> None:
        self.forward, self.backward, self.optimizer = (Stopwatch(device) for _ in range(3))

    def milliseconds(self, steps: int) -> dict[str, float]:
        """Mean of each part over so many steps. A host sync on a GPU."""
        parts = {"forward": self.forward, "backward": self.backward, "optimizer": self.optimizer}
        return {f"{name}_ms": 1000 * part.seconds() / steps for name, part in parts.items()}


@dataclass(frozen=True)
class Step:
    """An engine, and what it is run on."""

    row: Row
    engine: Engine
    device: torch.device

    def run(self, batch: Batch, clock: Clock | None = None) -> torch.Tensor:
        """One step of training, as train/loop.py makes it; the loss stays on the device."""
        clock = clock or Clock(self.device)
        clock.forward.start()
        with attention_of(self.row.variant):
            loss: torch.Tensor = self.engine.forward(batch)
        clock.forward.stop()
        clock.backward.start()
        self.engine.backward(loss)
        clock.backward.stop()
        clock.optimizer.start()
        self.engine.step()
        clock.optimizer.stop()
        return loss.detach()


def build_step(row: Row, device: torch.device) -> Step:
    recipe = row.recipe
    torch.manual_seed(recipe.train.seed)
    task = build_task(row)
    engine = build_engine(
        task,
        parameter_groups(task, recipe.optim.weight_decay),
        row.deepspeed,
        recipe.optim,
        compiled=recipe.train.compile,
    )
    engine.set_learning_rate(row.plan.lr)
    return Step(row, engine, device)


def build_task(row: Row) -> Pretrain:
    """The row's model and loss in its variant."""
    task = Pretrain(row.recipe)
    if row.variant == PAPER:
        embed_all_tokens(task.model, row.recipe.patch)
    return task


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def random_batch(recipe: Recipe, size: int, device: torch.device) -> Batch:
    """Noise made on the device, the same for equal shapes: no loader, no transfer."""
    generator = torch.Generator(device).manual_seed(recipe.train.seed)
    shape = (size, *recipe.geometry.clip, 3)
    clips = torch.randint(256, shape, dtype=torch.uint8, device=device, generator=generator)
    keys = torch.arange(size, device=device)
    valid = torch.ones(size, dtype=torch.bool, device=device)
    labels = torch.zeros_like(keys)
    if not recipe.needs_scores:
        return Batch(clips, keys, labels, valid)
    tokens = (size, recipe.geometry.num_tokens)
    scores = torch.rand(tokens, device=device, generator=generator)
    codes = torch.zeros(tokens, dtype=torch.int64, device=device)
    return Batch(clips, keys, labels, valid, scores=scores, codes=codes)


def peak_bytes(row: Row, device: torch.device) -> int:
    """Most bytes that tensors held from the building of the model on, nothing else being there."""
    free(device)
    # DeepSpeed (0.19.8) keeps the weights of a ZeRO-3 engine that was ended.
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    with Peak(device) as peak:
        step = build_step(row, device)
        batch = random_batch(row.recipe, row.plan.micro_batch, device)
        for _ in range(_STEPS_TO_THE_PEAK):
            step.run(batch)
    step.engine.deepspeed.destroy()
    return peak.bytes - before


def count_flops(row: Row) -> tuple[int, int]:
    """FLOP of one clip as PyTorch counts them: forward, and forward with backward.

    In single operations whatever the row's kernels, so that nothing that a fused kernel computes
    a second time counts. On shapes alone: costs no memory.
    """
    with torch.device("meta"), attention_of(PAPER):
        task = build_task(row)
        batch = random_batch(row.recipe, 1, torch.device("cpu")).to(torch.device("meta"))
        counter = FlopCounterMode(display=False)
        with counter:
            loss = task(batch)
            forward = counter.get_total_flops()
            loss.backward()
        return forward, counter.get_total_flops()


def largest(fits: Callable[[int], bool], *, limit: int = 2**16) -> int:
    """The largest number that fits, 0 if none does, where all below one that fits do too."""
    below, above = 0, 1
    while above <= limit and fits(above):
        below, above = above, 2 * above
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if fits(middle) else (below, middle)
    return below


def fits_in_memory(row: Row, device: torch.device) -> bool:
    """Whether the row's step runs on this GPU, from a clean state and leaving one."""
    try:
        peak_bytes(row, device)
    except torch.OutOfMemoryError:
        return False
    finally:
        # Only now: until here the error held the frames, and with them their tensors.
        free(device)
    return True
