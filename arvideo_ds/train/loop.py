"""The training loop, straight down: load, step, log, save."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from arvideo_ds.config import Recipe, RunPlan
from arvideo_ds.data.loader import Batch, TrainLoader
from arvideo_ds.engine.build import Engine
from arvideo_ds.engine.world import World
from arvideo_ds.errors import UserError
from arvideo_ds.optim.schedule import learning_rate
from arvideo_ds.train.interrupt import Interrupt
from arvideo_ds.train.metrics import Meter, quarantine
from arvideo_ds.train.run_folder import QUARANTINE

# A share means nothing before so many clips were seen.
_CLIPS_BEFORE_SKIP_LIMIT = 200


class Sink(Protocol):
    def log(self, metrics: dict[str, Any]) -> None: ...


@dataclass
class Run:
    """Everything the loop works with; built by run.py."""

    recipe: Recipe
    plan: RunPlan
    world: World
    engine: Engine
    loader: TrainLoader
    folder: Path
    first_step: int
    sinks: list[Sink]
    save: Callable[[int], None]


@dataclass
class Outcome:
    """Where the loop ended: `steps` done in all, the last metrics, and whether it was stopped."""

    steps: int
    metrics: dict[str, Any]
    interrupted: bool


def train(run: Run) -> Outcome:
    """Steps first_step..steps-1. Every rank calls it; an interruption ends it after a save."""
    meter = Meter(run.world.device)
    totals = {"seen": 0.0, "skipped": 0.0}
    metrics: dict[str, Any] = {}
    # Closed on every way out: data workers ignore signals and would outlive an error.
    with closing(iter(run.loader)) as batches, Interrupt(run.world.size) as interrupt:
        for step in range(run.first_step, run.plan.steps):
            lr = _schedule(run.plan, step)
            run.engine.set_learning_rate(lr)
            for _ in range(run.plan.accumulation):
                batch = _next_batch(batches, run, meter)
                loss = run.engine.forward(batch)
                run.engine.backward(loss)
                run.engine.step()
                meter.add(loss, batch)
            meter.steps += 1
            done = step + 1
            stop = interrupt.agreed()
            saving = done % run.recipe.train.save_every == 0 or done == run.plan.steps or stop
            # Whatever is saved was looked at first.
            if saving or done % run.recipe.train.log_every == 0:
                metrics = _log(run, meter, done, lr, totals)
                meter = Meter(run.world.device)
            if saving:
                run.save(done)
            if stop and done < run.plan.steps:
                return Outcome(done, metrics, interrupted=True)
    return Outcome(run.plan.steps, metrics, interrupted=False)


def _schedule(plan: RunPlan, step: int) -> float:
    return learning_rate(
        step,
        steps=plan.steps,
        warmup_steps=plan.warmup_steps,
        peak=plan.lr,
        start=plan.warmup_lr,
        end=plan.min_lr,
    )


def _next_batch(batches: Iterator[Batch], run: Run, meter: Meter) -> Batch:
    started = time.perf_counter()
    batch = next(batches)
    meter.data_wait_s += time.perf_counter() - started
    quarantine(run.folder, run.world.rank, batch.skipped)
    return batch.to(run.world.device)


def _log(run: Run, meter: Meter, done: int, lr: float, totals: dict[str, float]) -> dict[str, Any]:
    """Reduce over ranks, check, write. Collective."""
    reduced = meter.reduce(run.world.size)
    totals["seen"] += reduced.pop("data/seen")
    totals["skipped"] += reduced.pop("data/skipped")
    norm = run.engine.gradient_norm()
    metrics: dict[str, Any] = {
        "step": done,
        "epoch": done * run.plan.videos_per_step / run.plan.num_videos,
        **reduced,
        "lr": lr,
        **({} if norm is None else {"grad_norm_preclip": norm}),
        "data/skipped_total": totals["skipped"],
        "data/workers_gib": run.loader.workers_resident_gib(),
    }
    if run.world.is_main:
        for sink in run.sinks:
            sink.log(metrics)
    _require_healthy(run, metrics, totals)
    return metrics


def _require_healthy(run: Run, metrics: dict[str, Any], totals: dict[str, float]) -> None:
    """Stop on numbers that are no use to anybody; all ranks have the same ones."""
    if not math.isfinite(metrics["loss/pretrain"]):
        raise UserError(
            f"the loss is {metrics['loss/pretrain']} at step {metrics['step']}. The checkpoints in "
            f"{run.folder} are from before it. Start another run (--output) with a lower "
            "optim.base_lr, with optim.clip, or with train.precision=fp32."
        )
    share, limit = totals["skipped"] / totals["seen"], run.recipe.data.max_skipped_share
    if totals["seen"] >= _CLIPS_BEFORE_SKIP_LIMIT and share > limit:
        raise UserError(
            f"{share:.1%} of the clips did not decode, above data.max_skipped_share={limit}. The "
            f"videos stand in {run.folder / QUARANTINE}; check the shards, or raise the limit."
        )
