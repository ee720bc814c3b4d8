"""All measurements of the rows, as one document."""

from __future__ import annotations

import platform
import subprocess
import time
from contextlib import closing
from functools import partial
from importlib import metadata
from typing import Any

import torch

from arvideo_ds.benchmark import compare
from arvideo_ds.benchmark.operators import by_group, profile_steps
from arvideo_ds.benchmark.rows import BenchmarkOptions, Log, Row
from arvideo_ds.benchmark.step import (
    Step,
    build_step,
    fits_in_memory,
    kernels,
    largest,
    peak_bytes,
    random_batch,
    synchronize,
)
from arvideo_ds.config.load import validate
from arvideo_ds.data.clips import TrainClips
from arvideo_ds.data.loader import TrainLoader, worker_count
from arvideo_ds.engine.resolve import zero_stage
from arvideo_ds.engine.world import World, start_world
from arvideo_ds.errors import UserError
from arvideo_ds.host import available_cores, cpu_name
from arvideo_ds.long_video.score_store import open_scores
from arvideo_ds.planning.plan import make_plan
from arvideo_ds.shards.manifest import ShardSet
from arvideo_ds.train.metrics import peak_tflops
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
            "the rows do not fit into the GPU's memory at "
            f"{max(row.plan.micro_batch for row in rows)} clips: all "
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
        facts = compare.describe(row) | kernels(row, device)
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
        stated = peak_tflops(step.row.recipe.train, device)
        result = compare.summarize(described[number], times, peak, product, stated)
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


def time_from_shards(
    step: Step, options: BenchmarkOptions, *, cores: int, log: Log
) -> dict[str, Any]:
    """Clips/s of steps on clips of `options.shards`, and the share of the time waiting for data.

    Makes as many steps as all rounds together. cores: for the loader's workers, unless the recipe
    sets their number.
    """
    shards = ShardSet(str(options.shards))
    steps, warm_up = options.rounds * options.steps, options.warm_up
    tree = step.row.recipe.model_dump()
    tree["data"] |= {"shards": options.shards, "sources": None}
    tree["train"]["max_steps"] = steps + warm_up
    recipe = validate(tree, f"row {step.row.name}")
    plan = make_plan(recipe, world_size=1, num_videos=shards.num_samples)
    workers = worker_count(recipe, cores=cores)
    loader = TrainLoader(
        shards,
        recipe,
        plan,
        rank=0,
        first_step=0,
        num_workers=workers,
        pin_memory=step.device.type == "cuda",
        clips=partial(TrainClips, scores=open_scores(shards, recipe)),
    )
    log(f"{steps} steps of {step.row.name} from {options.shards}, {workers} worker(s)")
    clips, skipped, wait_s, started = 0, 0, 0.0, 0.0
    with closing(iter(loader)) as batches:
        for number in range(steps + warm_up):
            if number == warm_up:
                synchronize(step.device)
                clips, skipped, wait_s, started = 0, 0, 0.0, time.perf_counter()
            requested = time.perf_counter()
            batch = next(batches)
            wait_s += time.perf_counter() - requested
            clips, skipped = clips + len(batch.keys), skipped + batch.num_skipped
            step.run(batch.to(step.device))
        synchronize(step.device)
        elapsed_s = time.perf_counter() - started
    return {
        "row": step.row.name,
        "decoder": loader.decoder,
        "workers": workers,
        "repeats": plan.repeats,
        "clips": clips,
        "clips_skipped": skipped,
        "clips_per_s": clips / elapsed_s,
        "data_wait_pct": 100 * wait_s / elapsed_s,
    }


def machine(device: torch.device) -> dict[str, Any]:
    """Hardware and versions."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "device": device.type,
        "gpu": gpu,
        "driver": query_gpu("driver_version") if gpu else None,
        "cpu": cpu_name(),
        "cores": len(available_cores()),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "deepspeed", "timm")},
        "cuda": torch.version.cuda if gpu else None,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
        "commit": git_commit(),
    }


def query_gpu(fields: str) -> str | None:
    """What `nvidia-smi --query-gpu` prints for the first GPU; None where it does not run."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.splitlines()), None)
