"""The training step of a row on one process: built, run, timed, counted."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from arvideo_ds.benchmark.rows import PAPER, Row
from arvideo_ds.config import Recipe
from arvideo_ds.data.loader import Batch
from arvideo_ds.engine.attention import chosen_kernels, preferred_kernels
from arvideo_ds.engine.build import Engine, build_engine, can_compile
from arvideo_ds.engine.peak import Peak
from arvideo_ds.engine.resolve import compiles
from arvideo_ds.engine.world import use_tf32
from arvideo_ds.geometry import Triple
from arvideo_ds.models.cubes import pick, to_cubes
from arvideo_ds.models.objective import Objective
from arvideo_ds.optim.groups import parameter_groups
from arvideo_ds.tasks.pretrain import Pretrain
from arvideo_ds.train.metrics import Stopwatch

# The first step allocates AdamW's moments; the second has the usual peak.
_STEPS_TO_THE_PEAK = 2


def attention_of(variant: str) -> contextlib.AbstractContextManager[None]:
    """Selects the attention kernels of a forward pass."""
    # "Math": scores, softmax and weighted sum one after another, each written to memory.
    return sdpa_kernel(SDPBackend.MATH) if variant == PAPER else contextlib.nullcontext()


def embed_all_tokens(objective: Objective, patch: Triple) -> None:
    """Make the encoder embed every token of the clip, then pick the encoded tokens.

    The same numbers at a higher cost. Source: the official codes of VideoMAE and ARVideo, whose
    patch embedding is a convolution over the whole clip.
    """
    encoder = objective.encoder
    embed, clips = encoder.embed_cubes, list[Tensor]()

    def remember(_module: Any, inputs: tuple[Tensor, ...]) -> None:
        clips.append(inputs[0])

    def embed_all(_picked: Tensor, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        cubes = to_cubes(clips.pop(), patch)
        indices = torch.arange(cubes.shape[1], device=cubes.device).expand(cubes.shape[:2])
        return pick(embed(cubes, indices, positions), tokens)

    objective.register_forward_pre_hook(remember)
    encoder.embed_cubes = embed_all  # type: ignore[method-assign, assignment]


class Clock:
    """Times the parts of steps: forward, backward, optimiser."""

    def __init__(self, device: torch.device) -> None:
        self.forward, self.backward, self.optimizer = (Stopwatch(device) for _ in range(3))

    def milliseconds(self, steps: int) -> dict[str, float]:
        """Mean of each part over `steps` steps. A host sync on a GPU."""
        return {f"{name}_ms": 1000 * part.seconds() / steps for name, part in vars(self).items()}


@dataclass(frozen=True)
class Step:
    row: Row
    engine: Engine
    device: torch.device

    def run(self, batch: Batch, clock: Clock | None = None) -> torch.Tensor:
        """One training step, as in train/loop.py; the loss stays on the device."""
        clock = clock or Clock(self.device)
        clock.forward.start()
        with preferred_kernels(self.row.recipe, self.device), attention_of(self.row.variant):
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
    optim, train = row.recipe.optim, row.recipe.train
    torch.manual_seed(train.seed)
    use_tf32(device, train.tf32)
    task = build_task(row)
    groups = parameter_groups(task, optim.weight_decay)
    engine = build_engine(task, groups, row.deepspeed, optim, compiled=compiled(row, device))
    engine.set_learning_rate(row.plan.lr)
    return Step(row, engine, device)


def compiled(row: Row, device: torch.device) -> bool:
    """Whether the row is compiled; the published implementations are not."""
    able = can_compile(device)
    return row.variant != PAPER and compiles(row.recipe, row.deepspeed, able=able)


def kernels(row: Row, device: torch.device) -> dict[str, Any]:
    """Whether the row is compiled, and its attention kernels."""
    with preferred_kernels(row.recipe, device), attention_of(row.variant):
        attention = chosen_kernels(row.recipe, row.plan, device)
    return {"compile": compiled(row, device), "attention": attention}


def build_task(row: Row) -> Pretrain:
    """The row's model and loss in its variant."""
    task = Pretrain(row.recipe)
    if row.variant == PAPER:
        embed_all_tokens(task.model, row.recipe.patch)
    return task


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """Free the memory of tensors that nothing references any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def random_batch(recipe: Recipe, size: int, device: torch.device) -> Batch:
    """Noise from the recipe's seed, made on the device: no loader, no transfer."""
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


def peak_bytes(row: Row, device: torch.device) -> int | None:
    """Peak bytes of tensors, from building the model to the second step.

    None for a compiled row on a CPU, whose tensors cannot be followed.
    """
    if device.type != "cuda" and compiled(row, device):
        return None
    free(device)
    # DeepSpeed (0.19.8) keeps the weights of a destroyed ZeRO-3 engine.
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

    Counted in single operations, so that recomputation in fused kernels does not count; on meta
    tensors, without memory.
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
    """The largest number that fits, by bisection; 0 if none fits."""
    below, above = 0, 1
    while above <= limit and fits(above):
        below, above = above, 2 * above
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if fits(middle) else (below, middle)
    return below


def fits_in_memory(row: Row, device: torch.device) -> bool:
    """Whether the row's step runs on this GPU; frees the memory before and after."""
    try:
        peak_bytes(row, device)
    except torch.OutOfMemoryError:
        return False
    finally:
        # Not in `except`, where the error still references the frames and their tensors.
        free(device)
    return True
