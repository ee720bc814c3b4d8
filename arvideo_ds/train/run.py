"""The composition root: from a settled command line to a trained, recorded run.

The only file that sees every room. Order of a start: settings (settle.py) -> process group ->
model and engine -> newest checkpoint -> loader -> loop -> weights and summary.
"""

from __future__ import annotations

import json
import socket
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from arvideo_ds.data.loader import TrainLoader, worker_count
from arvideo_ds.data.manifest import ShardSet
from arvideo_ds.engine.agreement import gather_names
from arvideo_ds.engine.build import Engine, build_engine
from arvideo_ds.engine.checkpoints import (
    Checkpoint,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from arvideo_ds.engine.export import export_weights
from arvideo_ds.engine.world import World, start_world
from arvideo_ds.errors import EXIT_OK, UserError
from arvideo_ds.optim.groups import parameter_groups
from arvideo_ds.tasks.pretrain import Pretrain
from arvideo_ds.train import record, run_folder
from arvideo_ds.train.failure import guarded
from arvideo_ds.train.guard import Guard
from arvideo_ds.train.heartbeat import Heartbeat
from arvideo_ds.train.interrupt import Interrupt
from arvideo_ds.train.loop import Run, Sink, train
from arvideo_ds.train.metrics import Console, JsonLines, Wandb
from arvideo_ds.train.settle import Options, Settings

# A script that requeues asks for exactly this code (EX_TEMPFAIL).
EXIT_INTERRUPTED = 75


def pretrain(options: Options, settings: Settings, shards: ShardSet) -> int:
    """Run to the end, or to an agreed interruption. Every rank calls it; returns the exit code."""
    folder = options.folder
    shards.check_sizes()
    run_folder.require_same_mathematics(folder, settings.recipe)
    with Interrupt() as interrupt:
        world = start_world()
        interrupt.connect(world.size)
        return guarded(
            lambda: _pretrain(options, settings, shards, world, interrupt),
            folder,
            rank=world.rank,
            size=world.size,
        )


def _pretrain(
    options: Options, settings: Settings, shards: ShardSet, world: World, interrupt: Interrupt
) -> int:
    folder = options.folder
    if world.device.type == "cpu" and settings.recipe.train.precision == "fp16":
        raise UserError("DeepSpeed has no fp16 on a CPU; use train.precision=bf16 or fp32.")
    with ExitStack() as held:
        if world.is_main:
            held.enter_context(run_folder.lock(folder))
        heartbeat = held.enter_context(
            Heartbeat(
                folder, rank=world.rank, size=world.size, stall_s=settings.recipe.train.stall_s
            )
        )
        checkpoint = _checkpoint(options, shards)
        first_step = 0 if checkpoint is None else checkpoint.step
        engine = _engine(settings)
        if checkpoint is not None:
            load_checkpoint(engine, checkpoint)
        loader = _loader(settings, shards, world, first_step, folder)
        facts = record.facts(settings, shards, world.size)
        if world.is_main:
            run_folder.write_recipe(folder, settings.recipe)
            (folder / "run.json").write_text(json.dumps(facts, indent=1) + "\n")
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
                sinks=_sinks(settings, folder, first_step, held) if world.is_main else [],
                hosts=gather_names(socket.gethostname()),
                heartbeat=heartbeat,
                guard=_guard(settings, loader, world, first_step, folder),
                interrupt=interrupt,
                save=lambda step: _save(engine, folder, step, facts, settings),
            )
        )
        if world.is_main:
            if not outcome.interrupted:
                _export(folder)
            elapsed_s = time.monotonic() - started
            record.summarize(options, settings, shards, outcome, first_step, elapsed_s)
    dist.barrier()
    interrupt.disconnect()
    dist.destroy_process_group()
    return EXIT_INTERRUPTED if outcome.interrupted else EXIT_OK


def _checkpoint(options: Options, shards: ShardSet) -> Checkpoint | None:
    """What to go on from: the run's own newest checkpoint, else that of --resume, else nothing."""
    own = newest_checkpoint(options.folder / run_folder.CHECKPOINTS)
    if own is None and options.resume is None:
        return None
    found = own or newest_checkpoint(Path(options.resume or "") / run_folder.CHECKPOINTS)
    if found is None:
        raise UserError(f"--resume {options.resume}: that run holds no complete checkpoint.")
    if found.facts["manifest"] != shards.hash:
        raise UserError(
            f"checkpoint {found.path} was trained on other shards than {shards.name}: the "
            "manifest differs, so its position in the data means nothing here. Point data.shards "
            "at the shards it was started with, or start another run with another --output."
        )
    return found


def _engine(settings: Settings) -> Engine:
    # Every rank draws the same initial weights.
    torch.manual_seed(settings.recipe.train.seed)
    task = Pretrain(settings.recipe)
    groups = parameter_groups(task, settings.recipe.optim.weight_decay)
    return build_engine(
        task,
        groups,
        settings.deepspeed,
        betas=settings.recipe.optim.betas,
        implementation=settings.recipe.optim.implementation,
        compiled=settings.recipe.train.compile,
    )


def _loader(
    settings: Settings, shards: ShardSet, world: World, first_step: int, folder: Path
) -> TrainLoader:
    workers = worker_count(settings.recipe, cores=world.cores)
    if world.is_main and workers > world.cores:
        print(
            f"note: {workers} data workers of a rank share its {world.cores} core(s); data.workers "
            "sets their number.",
            flush=True,
        )
    return TrainLoader(
        shards,
        settings.recipe,
        settings.plan,
        rank=world.rank,
        first_step=first_step,
        num_workers=workers,
        pin_memory=world.device.type == "cuda",
        left_out=run_folder.left_out(folder),
    )


def _guard(
    settings: Settings, loader: TrainLoader, world: World, first_step: int, folder: Path
) -> Guard:
    return Guard(
        folder,
        settings.recipe,
        settings.plan,
        rank=world.rank,
        first_step=first_step,
        video_at=loader.video_at,
    )


def _sinks(settings: Settings, folder: Path, first_step: int, held: ExitStack) -> list[Sink]:
    sinks: list[Sink] = [Console(settings.plan.steps), JsonLines(folder, first_step)]
    if settings.recipe.wandb.mode != "disabled":
        tracker = Wandb(folder, settings.recipe.wandb, settings.as_dict())
        # Before the ranks part: srun may end this one as soon as another has left.
        held.callback(tracker.close)
        sinks.append(tracker)
    return sinks


def _save(
    engine: Engine, folder: Path, step: int, facts: dict[str, Any], settings: Settings
) -> None:
    keep = settings.recipe.train.keep_checkpoints
    save_checkpoint(engine, folder / run_folder.CHECKPOINTS, step, facts, keep=keep)


def _export(folder: Path) -> None:
    """The finished run's weights, out of its last checkpoint."""
    checkpoint = newest_checkpoint(folder / run_folder.CHECKPOINTS)
    assert checkpoint is not None, "the loop saves after the last step"
    export_weights(checkpoint.path, folder / run_folder.MODEL, prefix=Pretrain.PREFIX)
