"""Rows side by side, measured in turn, so that drift of the machine affects all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from arvideo_ds.benchmark.rows import PAPER, BenchmarkOptions, Log, Row
from arvideo_ds.benchmark.step import Clock, Step, count_flops, random_batch, synchronize
from arvideo_ds.data.loader import Batch
from arvideo_ds.doctor.speed import matmul_gflops
from arvideo_ds.engine.resolve import zero_stage
from arvideo_ds.planning.cost import cost_of
from arvideo_ds.planning.memory import Strategy, footprint

# Kinetics-400's training videos, and the epochs of the papers' tables.
_VIDEOS, _EPOCHS = 240_000, 800
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_GIB = 2**30

Round = dict[str, float]


def time_in_turn(steps: Sequence[Step], options: BenchmarkOptions, log: Log) -> list[list[Round]]:
    """Rounds of every row, in turn (A B A B ...), after warm-up steps of each."""
    batches = [random_batch(s.row.recipe, s.row.plan.micro_batch, s.device) for s in steps]
    for step, batch in zip(steps, batches, strict=True):
        log(f"warming up {step.row.name}")
        for _ in range(options.warm_up):
            step.run(batch)
    measured: list[list[Round]] = [[] for _ in steps]
    for number in range(options.rounds):
        for step, batch, rounds in zip(steps, batches, measured, strict=True):
            rounds.append(_round(step, batch, options.steps))
            step_ms = f"{rounds[-1]['step_ms']:.1f} ms per step"
            log(f"round {number + 1}/{options.rounds} {step.row.name}: {step_ms}")
    return measured


def _round(step: Step, batch: Batch, steps: int) -> Round:
    dtype = _DTYPES[step.row.recipe.train.precision]
    product = matmul_gflops(step.device, dtype) / 1000
    clock = Clock(step.device)
    synchronize(step.device)
    started = time.perf_counter()
    for _ in range(steps):
        step.run(batch, clock)
    synchronize(step.device)
    step_ms = 1000 * (time.perf_counter() - started) / steps
    clip_ms = step_ms / step.row.plan.micro_batch
    parts = clock.milliseconds(steps)
    return {"step_ms": step_ms, "clip_ms": clip_ms, **parts, "matmul_tflops": product}


def describe(row: Row) -> dict[str, Any]:
    """A row, and the operations of its step; without a measurement."""
    recipe, (forward, whole) = row.recipe, count_flops(row)
    cost, strategy, batch = cost_of(recipe), Strategy.from_json(row.deepspeed), row.plan.micro_batch
    predicted = footprint(recipe, strategy, world_size=1, micro_batch=batch, accumulation=1)
    return {
        "row": row.name,
        "variant": row.variant,
        "objective": recipe.objective.name,
        "clip": list(recipe.geometry.clip),
        "micro_batch": batch,
        "precision": recipe.train.precision,
        "zero_stage": zero_stage(row.deepspeed),
        "tokens_encoded": recipe.counts.encoded,
        "tokens_predicted": recipe.counts.predicted,
        "parameters": cost.parameters_encoder + cost.parameters_decoder,
        "gflop_forward_per_clip": forward / 1e9,
        "gflop_forward_per_clip_by_formula": cost.flops_forward_per_clip / 1e9,
        "gflop_step_per_clip": whole / 1e9,
        "peak_gib_by_formula": None if row.variant == PAPER else predicted.peak / _GIB,
    }


def summarize(
    described: dict[str, Any],
    rounds: list[Round],
    peak_bytes: int | None,
    matmul_tflops: float,
    peak_tflops: float | None = None,
) -> dict[str, Any]:
    """A row's figures: spreads over the rounds, peak memory, shares of both peaks, hours of a long
    run. peak_tflops: as stated for the device, where it is known."""
    batch, gflop = described["micro_batch"], described["gflop_step_per_clip"]
    rates = [1000 * batch / r["step_ms"] for r in rounds]
    achieved = [rate * gflop / 1000 for rate in rates]
    return {
        **described,
        "clips_per_s": spread(rates),
        **{key: spread([r[key] for r in rounds]) for key in rounds[0] if key.endswith("_ms")},
        "peak_gib": peak_bytes and peak_bytes / _GIB,
        "tflops": spread(achieved),
        "matmul_tflops": matmul_tflops,
        "share_of_matmul_pct": 100 * statistics.median(achieved) / matmul_tflops,
        "share_of_peak_pct": peak_tflops and 100 * statistics.median(achieved) / peak_tflops,
        "k400_800_epochs_hours": _VIDEOS * _EPOCHS / statistics.median(rates) / 3600,
    }


def best_products(rows: Sequence[Row], rounds: Sequence[list[Round]]) -> dict[str, float]:
    """TFLOP/s of the best matrix product in each precision, over all rows."""
    best: dict[str, float] = {}
    for row, measured in zip(rows, rounds, strict=True):
        precision = row.recipe.train.precision
        best[precision] = max(best.get(precision, 0.0), *(r["matmul_tflops"] for r in measured))
    return best


def against_first(
    rounds: list[Round], first: list[Round], peak_bytes: int | None, first_peak_bytes: int | None
) -> dict[str, Any]:
    """Difference of time per clip (round by round) and memory from the first row, in percent.

    The memory's is None where one of them is unknown.
    """
    times = [100 * (r["clip_ms"] / f["clip_ms"] - 1) for r, f in zip(rounds, first, strict=True)]
    memory = None
    if peak_bytes is not None and first_peak_bytes is not None:
        memory = 100 * (peak_bytes / first_peak_bytes - 1)
    return {"time_pct": spread(times), "memory_pct": memory}


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
