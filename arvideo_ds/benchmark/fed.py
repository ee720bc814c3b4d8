"""A row's step, fed from real shards by the project's loader."""

from __future__ import annotations

import time
from contextlib import closing
from functools import partial
from typing import Any

from arvideo_ds.benchmark.rows import BenchmarkOptions, Log
from arvideo_ds.benchmark.step import Step, synchronize
from arvideo_ds.config.load import validate
from arvideo_ds.data.clips import TrainClips
from arvideo_ds.data.loader import TrainLoader, worker_count
from arvideo_ds.long_video.score_store import open_scores
from arvideo_ds.planning.plan import make_plan
from arvideo_ds.shards.manifest import ShardSet


def time_from_shards(
    step: Step, options: BenchmarkOptions, *, cores: int, log: Log
) -> dict[str, Any]:
    """Clips/s of steps on clips of `options.shards`, and the share of the time waiting for data.

    Makes as many steps as all rounds together. cores: for the loader's workers, unless the recipe
    sets their number.
    """
    shards = ShardSet(str(options.shards))
    shards.check_sizes()
    steps, warm_up = options.rounds * options.steps, options.warm_up
    tree = step.row.recipe.model_dump()
    tree["data"]["shards"], tree["train"]["max_steps"] = options.shards, steps + warm_up
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
