"""The training loop, straight down: load, step, validate, log, save."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from arvideo_ds.data.loader import Batch, TrainLoader
from arvideo_ds.engine.agreement import gather_objects
from arvideo_ds.engine.build import Engine
from arvideo_ds.engine.checkpoints import save_checkpoint
from arvideo_ds.engine.world import World
from arvideo_ds.optim.schedule import learning_rate
from arvideo_ds.planning.cost import forward_passes
from arvideo_ds.planning.plan import PhasePlan, RunPlan
from arvideo_ds.runs.run_folder import CHECKPOINTS
from arvideo_ds.train.baseline import Baseline
from arvideo_ds.train.guard import Guard
from arvideo_ds.train.heartbeat import Heartbeat
from arvideo_ds.train.metrics import Meter, Reading, peak_tflops, quarantine
from arvideo_ds.train.settle import RunSettings
from arvideo_ds.train.signals import Interrupt
from arvideo_ds.train.validation import Validation


@dataclass
class Run:
    """Everything the loop works with; built by run.py."""

    settings: RunSettings[Any]
    world: World
    engine: Engine
    # Of the current phase, and what makes that of another one and changes the engine to it.
    loader: TrainLoader
    enter: Callable[[PhasePlan], TrainLoader]
    first_step: int
    sinks: list[Callable[[dict[str, Any]], None]]
    heartbeat: Heartbeat
    guard: Guard
    baseline: Baseline
    interrupt: Interrupt
    validation: Validation | None
    # Saved with every checkpoint.
    facts: dict[str, Any]


@dataclass
class Outcome:
    """Where the loop ended: total `steps`, the last metrics, and whether it was interrupted."""

    steps: int
    metrics: dict[str, Any]
    interrupted: bool


def train(run: Run) -> Outcome:
    """Steps first_step..steps-1. Every rank calls it; an interruption ends it after a save."""
    plan = run.settings.plan
    outcome = Outcome(plan.steps, {}, interrupted=False)
    for part in plan.parts:
        if part.end_step > run.first_step and not outcome.interrupted:
            if part.first_step > run.first_step:
                run.loader = run.enter(part)
            outcome = _train_phase(run, part)
    if not outcome.interrupted:
        run.heartbeat.beat("end", plan.steps)
    return outcome


def _train_phase(run: Run, part: PhasePlan) -> Outcome:
    """The steps of a phase that are left."""
    train_settings, plan = run.settings.recipe.train, part.plan
    meter, metrics = _meter(run, plan), dict[str, Any]()
    beat, hosts = run.heartbeat.beat, gather_objects(socket.gethostname())
    # Closed on every way out: data workers ignore signals and would outlive an error.
    with closing(iter(run.loader)) as batches:
        for step in range(max(run.first_step, part.first_step), part.end_step):
            done = step + 1
            lr = learning_rate(plan, step)
            run.engine.set_learning_rate(lr)
            for _ in range(plan.accumulation):
                beat("data", done)
                batch = _next_batch(batches, run, meter)
                run.baseline.see(batch)
                beat("forward", done)
                meter.forward.start()
                loss = run.engine.forward(batch)
                meter.forward.stop()
                beat("backward", done)
                run.engine.backward(loss)
                beat("update", done)
                run.engine.step()
                meter.add(loss, batch)
            meter.refused.append(run.engine.refused())
            stop = run.interrupt.agreed()
            validates = run.validation is not None and run.validation.due(done)
            last = done == plan.steps
            saves = validates or stop or last or done % train_settings.save_every == 0
            # The first step shows that it runs, and how fast. Metrics are checked before each save,
            # and are of one phase.
            logs = done in (1, part.end_step) or done % train_settings.log_every == 0
            if logs or saves:
                beat("log", done)
                reading = meter.read(hosts)
                run.baseline.read(run.world.device)
                validated = _validate(run, done) if validates else {}
                metrics = _log(run, part, reading, done, lr, validated)
                run.guard.require_health(done, metrics, reading)
                meter = _meter(run, plan)
            if saves:
                beat("save", done)
                _save(run, done, metrics)
            if stop and not last:
                return Outcome(done, metrics, interrupted=True)
    return Outcome(plan.steps, metrics, interrupted=False)


def _meter(run: Run, plan: RunPlan) -> Meter:
    recipe, device = run.settings.recipe, run.world.device
    return Meter(
        device,
        recipe.task,
        plan.sequence_parallel,
        gflops=plan.gflops_forward_per_clip,
        teacher_gflops=plan.gflops_teacher_per_clip,
        passes=forward_passes(recipe),
        peak_tflops=peak_tflops(recipe.train, device),
    )


def _validate(run: Run, done: int) -> dict[str, float]:
    assert run.validation is not None
    run.heartbeat.beat("validate", done)
    return run.validation.run()


def _save(run: Run, done: int, metrics: dict[str, Any]) -> None:
    settings = run.settings
    folder, keep = settings.folder / CHECKPOINTS, settings.recipe.train.keep_checkpoints
    save_checkpoint(run.engine, folder, done, run.facts, keep=keep)
    if run.validation is not None and run.world.is_main:
        run.validation.keep_best(done, metrics)


def _next_batch(batches: Iterator[Batch], run: Run, meter: Meter) -> Batch:
    started = time.perf_counter()
    batch = next(batches)
    meter.data_wait_s += time.perf_counter() - started
    quarantine(run.settings.folder, run.world.rank, batch.skipped)
    return batch.to(run.world.device)


def _log(
    run: Run,
    part: PhasePlan,
    reading: Reading,
    done: int,
    lr: float,
    validated: dict[str, float],
) -> dict[str, Any]:
    norm, seen = run.engine.gradient_norm(), part.videos_before(done)
    videos = run.loader.videos_by_source(seen)
    metrics: dict[str, Any] = {
        "step": done,
        **({"phase": part.number + 1} if run.settings.plan.phases else {}),
        "epoch": seen / part.plan.num_videos,
        **reading.metrics,
        "lr": lr,
        **({"time/compile_s": run.engine.compile_seconds()} if run.engine.compiled else {}),
        **({} if norm is None else {"grad_norm_preclip": norm}),
        **validated,
        **run.guard.count(reading),
        **{f"data/videos/{source}": count for source, count in videos.items()},
        "data/workers_gib": run.loader.workers_resident_gib(),
    }
    if run.world.is_main:
        for log in run.sinks:
            log(metrics)
    return metrics
