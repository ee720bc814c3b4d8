"""The composition root: from a settled command line to a trained, recorded run.

Order of a start: settings (settle.py) -> process group -> data check and newest checkpoint -> model
and engine -> loader -> loop -> weights and summary.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from arvideo_ds.config.teachers import EMA
from arvideo_ds.data.clips import MixedClips, TrainClips
from arvideo_ds.data.loader import TrainLoader, worker_count
from arvideo_ds.decoding.decoders import first_usable, usable_decoders
from arvideo_ds.engine.agreement import AnyRank, gather_objects
from arvideo_ds.engine.attention import chosen_kernels, preferred_kernels
from arvideo_ds.engine.build import Engine, build_engine, can_compile
from arvideo_ds.engine.checkpoints import (
    Checkpoint,
    export_weights,
    load_checkpoint,
    load_frozen,
    newest_checkpoint,
)
from arvideo_ds.engine.form import Form
from arvideo_ds.engine.fragments import AVERAGE, follow_average, keep_average
from arvideo_ds.engine.resolve import compiles
from arvideo_ds.engine.world import World, start_world, use_tf32
from arvideo_ds.errors import EXIT_INTERRUPTED, EXIT_OK, UserError
from arvideo_ds.files.checksums import sha256_of
from arvideo_ds.files.locks import lock
from arvideo_ds.long_video.score_store import open_scores
from arvideo_ds.models.weight_files import weights_file
from arvideo_ds.optim.groups import parameter_groups
from arvideo_ds.planning.plan import PhasePlan
from arvideo_ds.runs import run_folder
from arvideo_ds.shards.mix import ShardMix
from arvideo_ds.tasks import PREFIX, task_of
from arvideo_ds.train import record
from arvideo_ds.train.baseline import BASELINE, Baseline
from arvideo_ds.train.failure import Peers, guarded
from arvideo_ds.train.guard import Guard
from arvideo_ds.train.heartbeat import Heartbeat
from arvideo_ds.train.lineage import PARENT, parent_facts
from arvideo_ds.train.loop import Run, train
from arvideo_ds.train.metrics import Console, JsonLines
from arvideo_ds.train.preflight import check_data, find_checkpoint
from arvideo_ds.train.settle import RunSettings
from arvideo_ds.train.signals import Interrupt
from arvideo_ds.train.trackers import TensorBoard, Tracker, Trackio, Wandb
from arvideo_ds.train.validation import Validation

# In run.json and in checkpoints: the file of the initial weights, its SHA-256 and what was loaded.
INITIAL = "initial_weights"


def start(settings: RunSettings[Any]) -> int:
    """Run to the end, or to an agreed interruption; the exit code. Every rank calls it."""
    folder = settings.folder
    run_folder.require_same_mathematics(folder, settings.recipe)
    with Interrupt() as interrupt:
        recorder = folder / run_folder.RECORDER if settings.recipe.train.flight_recorder else None
        world = start_world(recorder)
        interrupt.connect(AnyRank(world.size))
        peers = Peers(folder, world)
        return guarded(lambda: _run(settings, world, interrupt, peers), peers)


def _run(settings: RunSettings[Any], world: World, interrupt: Interrupt, peers: Peers) -> int:
    folder, recipe = settings.folder, settings.recipe
    if world.device.type == "cpu" and recipe.train.precision == "fp16":
        raise UserError("DeepSpeed has no fp16 on a CPU; use train.precision=bf16 or fp32.")
    with ExitStack() as stack, peers.watched():
        if world.is_main:
            stack.enter_context(lock(folder))
        use_tf32(world.device, recipe.train.tf32)
        check_data(settings, world)
        heartbeat = stack.enter_context(
            Heartbeat(folder, world, stall_s=recipe.train.stall_s, lost=peers.report)
        )
        checkpoint = find_checkpoint(settings)
        first_step = 0 if checkpoint is None else checkpoint.step
        forms = _forms(settings)
        module, initial = _module(settings, world, checkpoint)
        settings.task.freeze(module)
        if checkpoint is not None:
            load_frozen(module, checkpoint)
        engine = _engine(settings, world, module)
        if checkpoint is not None:
            load_checkpoint(engine, checkpoint)
        if recipe.teacher == EMA:
            pretraining: Any = module
            follow_average(engine, pretraining.followers())
        decoded = with_one_decoder(settings)

        def enter(part: PhasePlan) -> TrainLoader:
            """Change the engine to a phase; its loader."""
            if forms:
                forms[part.number].give_to(engine.module)
                engine.set_batch(part.plan.micro_batch, part.plan.accumulation)
            return _loader(decoded, part, world, max(part.first_step, first_step))

        loader = enter(settings.plan.part_at(first_step))
        stack.enter_context(preferred_kernels(recipe, world.device))
        facts = {
            **record.facts(settings, world.size),
            "compiled": engine.compiled,
            "attention": chosen_kernels(recipe, settings.plan, world.device),
            PARENT: parent_facts(folder, checkpoint),
            INITIAL: initial,
            BASELINE: None if checkpoint is None else checkpoint.facts.get(BASELINE),
        }
        validation = None
        if settings.validation is not None:
            validation = Validation(engine, decoded, world, first_step)
        if world.is_main:
            record.write_start(settings, world, facts, loader.decoder, first_step)
        started = time.monotonic()
        with ExitStack() as trackers:
            outcome = train(
                Run(
                    settings=settings,
                    world=world,
                    engine=engine,
                    loader=loader,
                    enter=enter,
                    first_step=first_step,
                    sinks=_sinks(settings, first_step, trackers) if world.is_main else [],
                    heartbeat=heartbeat,
                    guard=Guard(settings, world.rank, first_step, loader.video_at),
                    baseline=_baseline(settings, world, engine, facts),
                    interrupt=interrupt,
                    validation=validation,
                    facts=facts,
                )
            )
            interrupt.trained(interrupted=outcome.interrupted)
            if world.is_main:
                if not outcome.interrupted:
                    _export(settings)
                elapsed_s = time.monotonic() - started
                words = record.summarize(settings, outcome, first_step, elapsed_s, facts[BASELINE])
        if world.is_main:
            print(words, flush=True)  # after the words of closed trackers
        # Inside: a rank may end as soon as all are here, and is missed until then.
        dist.barrier()
    interrupt.disconnect()
    dist.destroy_process_group()
    return EXIT_INTERRUPTED if outcome.interrupted else EXIT_OK


def _forms(settings: RunSettings[Any]) -> list[Form]:
    """Of the model in each phase; none without phases. Errors: `UserError` for other weights."""
    if not settings.plan.phases:
        return []
    shards = settings.require_shards()
    forms = [Form(task_of(phase).build(shards)) for phase in settings.recipe.by_phase()]
    for number, form in enumerate(forms):
        form.require_parameters_of(forms[0], f"phases.{number}")
    return forms


def _module(
    settings: RunSettings[Any], world: World, checkpoint: Checkpoint | None
) -> tuple[nn.Module, dict[str, Any] | None]:
    """The module with its initial weights, and the entry `INITIAL` of run.json."""
    task, shards = task_of(settings.recipe.by_phase()[0]), settings.require_shards()
    # Every rank draws the same initial weights.
    torch.manual_seed(settings.recipe.train.seed)
    module = task.build(shards)
    if world.is_main and (words := task.build_words(module)) is not None:
        print(words, flush=True)
    if checkpoint is not None:
        return module, checkpoint.facts.get(INITIAL)
    report = task.initialize(module, shards)
    if report is None or not world.is_main:
        return module, None
    print(report, flush=True)
    file = weights_file(Path(settings.recipe.start.init_from)).resolve()
    return module, {"file": str(file), "sha256": sha256_of(file), "report": report.splitlines()}


def _engine(settings: RunSettings[Any], world: World, module: nn.Module) -> Engine:
    recipe, task = settings.recipe, settings.task
    groups = task.parameter_groups(module) or parameter_groups(
        module, recipe.optim.weight_decay, layer_decay=task.layer_decay
    )
    engine = build_engine(
        module,
        groups,
        settings.deepspeed,
        recipe.optim,
        compiled=compiles(recipe, settings.deepspeed, able=can_compile(world.device)),
        forms=len(settings.plan.parts),
    )
    if recipe.ema_decay is not None:
        keep_average(engine, recipe.ema_decay)
    return engine


def _loader(
    settings: RunSettings[Any], part: PhasePlan, world: World, first_step: int
) -> TrainLoader:
    """From a step to the end of its phase."""
    recipe, shards = settings.recipe.by_phase()[part.number], settings.require_shards()
    workers = worker_count(recipe, cores=world.cores)
    if world.is_main and workers > world.cores:
        print(
            f"note: {workers} data workers of a rank share its {world.cores} core(s); "
            "data.workers sets their number.",
            flush=True,
        )
    clips = settings.task.clips()
    if isinstance(shards, ShardMix):
        clips = {"clips": MixedClips}
    elif not clips:
        clips = {"clips": partial(TrainClips, scores=open_scores(shards, recipe))}
    return TrainLoader(
        shards,
        recipe,
        settings.plan,
        rank=world.rank,
        first_step=first_step,
        num_workers=workers,
        pin_memory=world.device.type == "cuda",
        left_out=run_folder.excluded_videos(settings.folder),
        **clips,
    )


def _baseline(
    settings: RunSettings[Any], world: World, engine: Engine, facts: dict[str, Any]
) -> Baseline:
    def keep(loss: float) -> None:
        facts[BASELINE] = loss  # in every checkpoint from now on
        if world.is_main:
            run_folder.write_facts(settings.folder, facts)
            print(f"predicting the mean of the targets would give loss {loss:.4f}", flush=True)

    return Baseline(facts[BASELINE], getattr(engine.module, "baseline", None), keep)


def _sinks(settings: RunSettings[Any], first_step: int, stack: ExitStack) -> list[Any]:
    folder, recipe, config = settings.folder, settings.recipe, settings.as_dict()
    console = Console(settings.plan.steps, settings.task)
    sinks = [console.log, JsonLines(folder, first_step).log]
    wandb, trackers = recipe.wandb.settled(), list[Tracker]()
    if wandb.mode != "disabled":
        trackers.append(Wandb(folder, wandb, config))
    if recipe.trackers.tensorboard:
        trackers.append(TensorBoard(folder, first_step))
    if recipe.trackers.trackio is not None:
        trackers.append(Trackio(folder, recipe.trackers.trackio, config))
    for tracker in trackers:
        # Before the last barrier: srun may end this rank as soon as another one has ended.
        stack.callback(tracker.close)
        sinks.append(tracker.log)
    return sinks


def _export(settings: RunSettings[Any]) -> None:
    folder = settings.folder
    checkpoint = newest_checkpoint(folder / run_folder.CHECKPOINTS)
    assert checkpoint is not None, "the loop saves after the last step"
    change = partial(settings.task.exported, metrics=(run_folder.read_metrics(folder) or [{}])[-1])
    export = partial(export_weights, checkpoint.path, prefix=PREFIX, change=change)
    export(folder / run_folder.MODEL)
    if settings.recipe.ema_decay is not None:
        export(folder / run_folder.EMA_MODEL, kind=AVERAGE)


def with_one_decoder(settings: RunSettings[Any]) -> RunSettings[Any]:
    """Replace data.decoder=auto by the first decoder that all ranks have. Collective."""
    recipe = settings.recipe
    if recipe.data.decoder != "auto":
        return settings
    layers = settings.require_shards().layers
    decoder = first_usable(gather_objects(usable_decoders()), layers=layers)
    data = recipe.data.model_copy(update={"decoder": decoder})
    return replace(settings, recipe=recipe.model_copy(update={"data": data}))
