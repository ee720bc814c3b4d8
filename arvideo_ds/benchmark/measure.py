"""All measurements of the rows, as one document."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import torch

from arvideo_ds.benchmark import compare
from arvideo_ds.benchmark.fed import time_from_shards
from arvideo_ds.benchmark.operators import by_group, profile_steps
from arvideo_ds.benchmark.rows import BenchmarkOptions, Log, Row
from arvideo_ds.benchmark.step import (
    Step,
    build_step,
    fits_in_memory,
    largest,
    peak_bytes,
    random_batch,
)
from arvideo_ds.engine.resolve import zero_stage
from arvideo_ds.engine.world import World, start_world
from arvideo_ds.errors import UserError
from arvideo_ds.host import available_cores, cpu_name
from arvideo_ds.version import git_commit


def measure(rows: list[Row], options: BenchmarkOptions, log: Log) -> dict[str, Any]:
    """Machine and rows; starts and ends a process group of one process.

    Errors: `UserError` where the rows do not fit into the GPU's memory.
    """
    world = start_world()
    if options.largest_batch and any(zero_stage(row.deepspeed) == 3 for row in rows):
        raise UserError(
            "--largest_batch builds an engine for every trial, and DeepSpeed never frees the "
            "weights of ZeRO-3 engines. Give a --deepspeed_config of a lower stage; on one process "
            "it needs the same memory."
        )
    if options.largest_batch and world.device.type != "cuda":
        raise UserError("--largest_batch needs a GPU; `arvideo plan` predicts what fits on one.")
    try:
        return _measure(rows, options, world, log)
    except torch.OutOfMemoryError:
        raise UserError(
            f"the rows do not fit into the GPU's memory at {rows[0].plan.micro_batch} clips: all "
            "models are there at once. Lower --micro_batch, or compare fewer rows."
        ) from None
    finally:
        torch.distributed.destroy_process_group()


def _measure(rows: list[Row], options: BenchmarkOptions, world: World, log: Log) -> dict[str, Any]:
    """Operations and memory of each row alone, then the times of all in turn."""
    device = world.device
    described, peaks = [], []
    for row in rows:
        log(f"counting operations and memory of {row.name}")
        facts = compare.describe(row)
        peaks.append(peak_bytes(row, device))
        if options.largest_batch:
            facts["largest_micro_batch"] = _largest_batch(row, device, log)
        described.append(facts)
    steps = [build_step(row, device) for row in rows]
    rounds = compare.time_in_turn(steps, options, log)
    products = compare.best_products(rows, rounds)
    results = []
    for number, step in enumerate(steps):
        times, peak = rounds[number], peaks[number]
        product = products[step.row.recipe.train.precision]
        result = compare.summarize(described[number], times, peak, product)
        if number:
            result["against_first"] = compare.against_first(times, rounds[0], peak, peaks[0])
        if options.profile:
            log(f"profiling {step.row.name}")
            result["profile"] = _profile(step, number, options)
        results.append(result)
    document: dict[str, Any] = {"machine": machine(device), "rows": results}
    if options.shards is not None:
        document["from_shards"] = time_from_shards(steps[0], options, cores=world.cores, log=log)
    return document


def _largest_batch(row: Row, device: torch.device, log: Log) -> int:
    def fits(micro_batch: int) -> bool:
        does = fits_in_memory(row.with_batch(micro_batch), device)
        log(f"{row.name}: {micro_batch} clips {'fit' if does else 'do not fit'}")
        return does

    return largest(fits)


def _profile(step: Step, number: int, options: BenchmarkOptions) -> dict[str, Any]:
    trace = options.trace and options.trace / f"row_{number + 1}.json"
    batch = random_batch(step.row.recipe, step.row.plan.micro_batch, step.device)
    return by_group(profile_steps(step, batch, options.steps, trace))


def machine(device: torch.device) -> dict[str, Any]:
    """Hardware and versions."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "device": device.type,
        "gpu": gpu,
        "cpu": cpu_name(),
        "cores": len(available_cores()),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "deepspeed", "timm")},
        "cuda": torch.version.cuda if gpu else None,
        "commit": git_commit(),
    }
