"""The composition root: from a settled command line to a trained, recorded run.

The only file that sees every room. Order of a start: settings (settle.py) -> process group ->
model and engine -> newest checkpoint -> loader -> loop -> weights and summary.
"""

from __future__ import annotations

import socket
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from arvideo_ds.data.clips import TrainClips
from arvideo_ds.data.loader import TrainLoader, worker_count
from arvideo_ds.engine.agreement import gather_names
from arvideo_ds.engine.build import Engine, build_engine
from arvideo_ds.engine.checkpoints import load_checkpoint, newest_checkpoint, save_checkpoint
from arvideo_ds.engine.export import export_weights
from arvideo_ds.engine.fragments import AVERAGE, keep_average
from arvideo_ds.engine.world import World, start_world
from arvideo_ds.errors import EXIT_INTERRUPTED, EXIT_OK, UserError
from arvideo_ds.files.atomic import write_json
from arvideo_ds.long_video.score_store import open_scores
from arvideo_ds.optim.groups import parameter_groups
from arvideo_ds.runs import run_folder
from arvideo_ds.shards.manifest import ShardSet
from arvideo_ds.tasks import PREFIX, Task
from arvideo_ds.train import record
from arvideo_ds.train.baseline import BASELINE, Baseline
from arvideo_ds.train.failure import guarded
from arvideo_ds.train.guard import Guard
from arvideo_ds.train.heartbeat import Heartbeat
from arvideo_ds.train.interrupt import Interrupt
from arvideo_ds.train.lineage import PARENT, parent_facts
from arvideo_ds.train.loop import Run, Sink, train
from arvideo_ds.train.metrics import Console, JsonLines, Wandb
from arvideo_ds.train.preflight import check_data, find_checkpoint
from arvideo_ds.train.settle import Options, Settings
from arvideo_ds.train.validation import Validation


def start(options: Options, settings: Settings[Any], shards: ShardSet) -> int:
    """Run to the end, or to an agreed interruption. Every rank calls it; returns the exit code."""
    folder = options.folder
    run_folder.require_same_mathematics(folder, settings.recipe)
    with Interrupt() as interrupt:
        world = start_world()
        interrupt.connect(world.size)
        return guarded(
            lambda: _start(options, settings, shards, world, interrupt),
            folder,
            rank=world.rank,
            size=world.size,
        )


def _start(
    options: Options, settings: Settings[Any], shards: ShardSet, world: World, interrupt: Interrupt
) -> int:
    folder, task = options.folder, settings.task
    if world.device.type == "cpu" and settings.recipe.train.precision == "fp16":
        raise UserError("DeepSpeed has no fp16 on a CPU; use train.precision=bf16 or fp32.")
    with ExitStack() as held:
        if world.is_main:
            held.enter_context(run_folder.lock(folder))
        check_data(settings, shards, world)
        heartbeat = held.enter_context(
            Heartbeat(
                folder, rank=world.rank, size=world.size, stall_s=settings.recipe.train.stall_s
            )
        )
        checkpoint = find_checkpoint(options, settings, shards)
        first_step = 0 if checkpoint is None else checkpoint.step
        engine = _engine(settings, task, shards, world, first=checkpoint is None)
        if checkpoint is not None:
            load_checkpoint(engine, checkpoint)
        loader = _loader(settings, task, shards, world, first_step, folder)
        facts = {
            **record.facts(settings, shards, world.size),
            PARENT: parent_facts(folder, checkpoint),
            BASELINE: None if checkpoint is None else checkpoint.facts.get(BASELINE),
        }
        validation = _validation(settings, task, engine, world, folder, first_step)
        if world.is_main:
            run_folder.write_recipe(folder, settings.recipe)
            run_folder.write_facts(folder, facts)
            if (names := task.labels(shards)) is not None:
                write_json(folder / run_folder.LABELS, names)
            record.print_header(options, settings, shards, world, loader.decoder, first_step)
        started = time.monotonic()
        outcome = train(
            Run(
                recipe=settings.recipe,
                plan=settings.plan,
                world=world,
                engine=engine,
                loader=loader,
                folder=folder,
                first_step=first_step,
                sinks=_sinks(settings, task, folder, first_step, held) if world.is_main else [],
                hosts=gather_names(socket.gethostname()),
                heartbeat=heartbeat,
                guard=Guard(
                    folder,
                    settings.recipe,
                    settings.plan,
                    rank=world.rank,
                    first_step=first_step,
                    video_at=loader.video_at,
                ),
                baseline=_baseline(engine, facts, world, folder),
                interrupt=interrupt,
                validation=validation,
                save=lambda step, metrics: _save(
                    engine, folder, step, metrics, facts, settings, validation
                ),
            )
        )
        interrupt.trained(interrupted=outcome.interrupted)
        if world.is_main:
            if not outcome.interrupted:
                _export(folder, task)
            elapsed_s = time.monotonic() - started
            record.summarize(
                options, settings, shards, outcome, first_step, elapsed_s, facts[BASELINE]
            )
    dist.barrier()
    interrupt.disconnect()
    dist.destroy_process_group()
    return EXIT_INTERRUPTED if outcome.interrupted else EXIT_OK


def _engine(
    settings: Settings[Any], task: Task, shards: ShardSet, world: World, *, first: bool
) -> Engine:
    recipe = settings.recipe
    # Every rank draws the same initial weights.
    torch.manual_seed(recipe.train.seed)
    module = task.build(shards)
    report = task.initialize(module, shards) if first else None
    if report is not None and world.is_main:
        print(report, flush=True)
    engine = build_engine(
        module,
        parameter_groups(module, recipe.optim.weight_decay, layer_decay=task.layer_decay),
        settings.deepspeed,
        recipe.optim,
        compiled=recipe.train.compile,
    )
    if task.ema_decay is not None:
        keep_average(engine, task.ema_decay)
    return engine


def _validation(
    settings: Settings[Any],
    task: Task,
    engine: Engine,
    world: World,
    folder: Path,
    first_step: int,
) -> Validation | None:
    shards = settings.validation
    if shards is None:
        return None
    validation = Validation(engine, task, settings.plan, shards, world, folder, first_step)
    if world.is_main:
        # An earlier start may have been killed between its last save and this.
        last = {m["step"]: m for m in run_folder.read_metrics(folder)}.get(first_step, {})
        validation.keep_best(first_step, last)
    return validation


def _loader(
    settings: Settings[Any],
    task: Task,
    shards: ShardSet,
    world: World,
    first_step: int,
    folder: Path,
) -> TrainLoader:
    workers = worker_count(settings.recipe, cores=world.cores)
    if world.is_main and workers > world.cores:
        print(
            f"note: {workers} data workers of a rank share its {world.cores} core(s); data.workers "
            "sets their number.",
            flush=True,
        )
    recipe = settings.recipe
    return TrainLoader(
        shards,
        recipe,
        settings.plan,
        rank=world.rank,
        first_step=first_step,
        num_workers=workers,
        pin_memory=world.device.type == "cuda",
        left_out=run_folder.left_out(folder),
        **(task.clips() or {"clips": partial(TrainClips, scores=open_scores(shards, recipe))}),
    )


def _baseline(engine: Engine, facts: dict[str, Any], world: World, folder: Path) -> Baseline:
    def keep(loss: float) -> None:
        facts[BASELINE] = loss  # which every checkpoint is saved with
        if world.is_main:
            run_folder.write_facts(folder, facts)
            print(f"predicting the mean of the targets would give loss {loss:.4f}", flush=True)

    return Baseline(facts[BASELINE], getattr(engine.module, "baseline", None), keep)


def _sinks(
    settings: Settings[Any], task: Task, folder: Path, first_step: int, held: ExitStack
) -> list[Sink]:
    sinks: list[Sink] = [Console(settings.plan.steps, task), JsonLines(folder, first_step)]
    wandb = settings.recipe.wandb.settled()
    if wandb.mode != "disabled":
        tracker = Wandb(folder, wandb, settings.as_dict())
        # Before the ranks part: srun may end this one as soon as another has left.
        held.callback(tracker.close)
        sinks.append(tracker)
    return sinks


def _save(
    engine: Engine,
    folder: Path,
    step: int,
    metrics: dict[str, Any],
    facts: dict[str, Any],
    settings: Settings[Any],
    validation: Validation | None,
) -> None:
    keep = settings.recipe.train.keep_checkpoints
    save_checkpoint(engine, folder / run_folder.CHECKPOINTS, step, facts, keep=keep)
    if validation is not None and dist.get_rank() == 0:
        validation.keep_best(step, metrics)


def _export(folder: Path, task: Task) -> None:
    """The finished run's weights, out of its last checkpoint."""
    checkpoint = newest_checkpoint(folder / run_folder.CHECKPOINTS)
    assert checkpoint is not None, "the loop saves after the last step"
    export_weights(checkpoint.path, folder / run_folder.MODEL, prefix=PREFIX)
    if task.ema_decay is not None:
        path = folder / run_folder.EMA_MODEL
        export_weights(checkpoint.path, path, prefix=PREFIX, kind=AVERAGE)
