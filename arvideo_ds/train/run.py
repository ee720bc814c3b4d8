"""The composition root: from a settled command line to a trained, recorded run.

The only file that sees every room. Order of a start: settings (settle.py) -> process group ->
model and engine -> newest checkpoint -> loader -> loop -> weights and summary.
"""

from __future__ import annotations

import socket
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from arvideo_ds.data.clips import TrainClips
from arvideo_ds.data.loader import TrainLoader, worker_count
from arvideo_ds.decoding.decoders import first_usable, usable_decoders
from arvideo_ds.engine.agreement import gather_texts
from arvideo_ds.engine.build import Engine, build_engine
from arvideo_ds.engine.checkpoints import (
    export_weights,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from arvideo_ds.engine.fragments import AVERAGE, keep_average
from arvideo_ds.engine.world import World, start_world
from arvideo_ds.errors import EXIT_INTERRUPTED, EXIT_OK, UserError
from arvideo_ds.files.atomic import write_json
from arvideo_ds.files.locks import lock
from arvideo_ds.long_video.score_store import open_scores
from arvideo_ds.optim.groups import parameter_groups
from arvideo_ds.runs import run_folder
from arvideo_ds.shards.manifest import ShardSet
from arvideo_ds.tasks import PREFIX
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
        run = _Start(options, settings, shards, world)
        return guarded(lambda: run(interrupt), folder, rank=world.rank, size=world.size)


class _Start:
    """One start of a run on one rank."""

    def __init__(
        self, options: Options, settings: Settings[Any], shards: ShardSet, world: World
    ) -> None:
        self.options, self.settings, self.shards, self.world = options, settings, shards, world
        self.folder, self.recipe, self.plan = options.folder, settings.recipe, settings.plan
        self.task = settings.task

    def __call__(self, interrupt: Interrupt) -> int:
        folder, recipe, world = self.folder, self.recipe, self.world
        if world.device.type == "cpu" and recipe.train.precision == "fp16":
            raise UserError("DeepSpeed has no fp16 on a CPU; use train.precision=bf16 or fp32.")
        with ExitStack() as held:
            if world.is_main:
                held.enter_context(lock(folder))
            check_data(self.settings, self.shards, world)
            stall_s = recipe.train.stall_s
            heartbeat = held.enter_context(
                Heartbeat(folder, rank=world.rank, size=world.size, stall_s=stall_s)
            )
            checkpoint = find_checkpoint(self.options, self.settings, self.shards)
            first_step = 0 if checkpoint is None else checkpoint.step
            engine = self._engine(first=checkpoint is None)
            if checkpoint is not None:
                load_checkpoint(engine, checkpoint)
            decoded = with_one_decoder(self.settings)
            loader = self._loader(decoded, first_step)
            facts = {
                **record.facts(self.settings, self.shards, world.size),
                PARENT: parent_facts(folder, checkpoint),
                BASELINE: None if checkpoint is None else checkpoint.facts.get(BASELINE),
            }
            validation = self._validation(decoded, engine, first_step)
            if world.is_main:
                self._write(facts, loader.decoder, first_step)
            started = time.monotonic()
            outcome = train(
                Run(
                    recipe=recipe,
                    plan=self.plan,
                    world=world,
                    engine=engine,
                    loader=loader,
                    folder=folder,
                    first_step=first_step,
                    sinks=self._sinks(first_step, held) if world.is_main else [],
                    hosts=gather_texts(socket.gethostname()),
                    heartbeat=heartbeat,
                    guard=Guard(
                        folder,
                        recipe,
                        self.plan,
                        rank=world.rank,
                        first_step=first_step,
                        video_at=loader.video_at,
                    ),
                    baseline=self._baseline(engine, facts),
                    interrupt=interrupt,
                    validation=validation,
                    save=partial(self._save, engine, facts, validation),
                )
            )
            interrupt.trained(interrupted=outcome.interrupted)
            if world.is_main:
                if not outcome.interrupted:
                    self._export()
                elapsed_s = time.monotonic() - started
                record.summarize(
                    self.options,
                    self.settings,
                    self.shards,
                    outcome,
                    first_step,
                    elapsed_s,
                    facts[BASELINE],
                )
        dist.barrier()
        interrupt.disconnect()
        dist.destroy_process_group()
        return EXIT_INTERRUPTED if outcome.interrupted else EXIT_OK

    def _engine(self, *, first: bool) -> Engine:
        recipe, task = self.recipe, self.task
        # Every rank draws the same initial weights.
        torch.manual_seed(recipe.train.seed)
        module = task.build(self.shards)
        report = task.initialize(module, self.shards) if first else None
        if report is not None and self.world.is_main:
            print(report, flush=True)
        engine = build_engine(
            module,
            parameter_groups(module, recipe.optim.weight_decay, layer_decay=task.layer_decay),
            self.settings.deepspeed,
            recipe.optim,
            compiled=recipe.train.compile,
        )
        if task.ema_decay is not None:
            keep_average(engine, task.ema_decay)
        return engine

    def _validation(
        self, settings: Settings[Any], engine: Engine, first_step: int
    ) -> Validation | None:
        shards = settings.validation
        if shards is None:
            return None
        validation = Validation(
            engine, settings.task, self.plan, shards, self.world, self.folder, first_step
        )
        if self.world.is_main:
            # An earlier start may have been killed between its last save and this.
            last = {m["step"]: m for m in run_folder.read_metrics(self.folder)}
            validation.keep_best(first_step, last.get(first_step, {}))
        return validation

    def _loader(self, settings: Settings[Any], first_step: int) -> TrainLoader:
        recipe, world = settings.recipe, self.world
        workers = worker_count(recipe, cores=world.cores)
        if world.is_main and workers > world.cores:
            print(
                f"note: {workers} data workers of a rank share its {world.cores} core(s); "
                "data.workers sets their number.",
                flush=True,
            )
        clips = settings.task.clips() or {
            "clips": partial(TrainClips, scores=open_scores(self.shards, recipe))
        }
        return TrainLoader(
            self.shards,
            recipe,
            self.plan,
            rank=world.rank,
            first_step=first_step,
            num_workers=workers,
            pin_memory=world.device.type == "cuda",
            left_out=run_folder.left_out(self.folder),
            **clips,
        )

    def _write(self, facts: dict[str, Any], decoder: str, first_step: int) -> None:
        run_folder.write_recipe(self.folder, self.recipe)
        run_folder.write_facts(self.folder, facts)
        if (names := self.task.labels(self.shards)) is not None:
            write_json(self.folder / run_folder.LABELS, names)
        record.print_header(
            self.options, self.settings, self.shards, self.world, decoder, first_step
        )

    def _baseline(self, engine: Engine, facts: dict[str, Any]) -> Baseline:
        def keep(loss: float) -> None:
            facts[BASELINE] = loss  # which every checkpoint is saved with
            if self.world.is_main:
                run_folder.write_facts(self.folder, facts)
                print(f"predicting the mean of the targets would give loss {loss:.4f}", flush=True)

        return Baseline(facts[BASELINE], getattr(engine.module, "baseline", None), keep)

    def _sinks(self, first_step: int, held: ExitStack) -> list[Sink]:
        sinks: list[Sink] = [
            Console(self.plan.steps, self.task),
            JsonLines(self.folder, first_step),
        ]
        wandb = self.recipe.wandb.settled()
        if wandb.mode != "disabled":
            tracker = Wandb(self.folder, wandb, self.settings.as_dict())
            # Before the ranks part: srun may end this one as soon as another has left.
            held.callback(tracker.close)
            sinks.append(tracker)
        return sinks

    def _save(
        self,
        engine: Engine,
        facts: dict[str, Any],
        validation: Validation | None,
        step: int,
        metrics: dict[str, Any],
    ) -> None:
        keep = self.recipe.train.keep_checkpoints
        save_checkpoint(engine, self.folder / run_folder.CHECKPOINTS, step, facts, keep=keep)
        if validation is not None and self.world.is_main:
            validation.keep_best(step, metrics)

    def _export(self) -> None:
        """The finished run's weights, out of its last checkpoint."""
        checkpoint = newest_checkpoint(self.folder / run_folder.CHECKPOINTS)
        assert checkpoint is not None, "the loop saves after the last step"
        export_weights(checkpoint.path, self.folder / run_folder.MODEL, prefix=PREFIX)
        if self.task.ema_decay is not None:
            path = self.folder / run_folder.EMA_MODEL
            export_weights(checkpoint.path, path, prefix=PREFIX, kind=AVERAGE)


def with_one_decoder(settings: Settings[Any]) -> Settings[Any]:
    """The settings with data.decoder=auto as the one that every rank takes. Collective."""
    recipe = settings.recipe
    if recipe.data.decoder != "auto":
        return settings
    usable = gather_texts(" ".join(usable_decoders()))
    decoder = first_usable([names.split() for names in usable])
    data = recipe.data.model_copy(update={"decoder": decoder})
    return replace(settings, recipe=recipe.model_copy(update={"data": data}))
