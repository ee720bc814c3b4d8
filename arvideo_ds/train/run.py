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

from arvideo_ds.config import (
    DetectRecipe,
    FinetuneRecipe,
    PretrainRecipe,
    Recipe,
    TokenizerRecipe,
)
from arvideo_ds.data.clips import TrainClips
from arvideo_ds.data.detection import TrainKeyframes, collate_keyframes
from arvideo_ds.data.loader import TrainLoader, worker_count
from arvideo_ds.engine.agreement import gather_names
from arvideo_ds.engine.build import Engine, build_engine
from arvideo_ds.engine.checkpoints import (
    Checkpoint,
    load_checkpoint,
    newest_checkpoint,
    newest_sound_checkpoint,
    save_checkpoint,
)
from arvideo_ds.engine.export import export_weights
from arvideo_ds.engine.fragments import AVERAGE, keep_average
from arvideo_ds.engine.world import World, start_world
from arvideo_ds.errors import EXIT_INTERRUPTED, EXIT_OK, UserError
from arvideo_ds.evaluation.pretrained import read_labels
from arvideo_ds.files.atomic import write_json
from arvideo_ds.long_video.score_store import TokenScores, hash_of_scores, open_scores
from arvideo_ds.long_video.training import TrainTokenizer
from arvideo_ds.models.layouts import load_classifier_weights
from arvideo_ds.optim.groups import parameter_groups
from arvideo_ds.runs import run_folder
from arvideo_ds.shards.manifest import ShardSet, by_set
from arvideo_ds.tasks import PREFIX
from arvideo_ds.tasks.detect import Detect
from arvideo_ds.tasks.finetune import Finetune
from arvideo_ds.tasks.pretrain import Pretrain
from arvideo_ds.train import record
from arvideo_ds.train.baseline import BASELINE, Baseline
from arvideo_ds.train.failure import guarded
from arvideo_ds.train.guard import Guard
from arvideo_ds.train.heartbeat import Heartbeat
from arvideo_ds.train.interrupt import Interrupt
from arvideo_ds.train.lineage import PARENT, parent_facts
from arvideo_ds.train.loop import Run, Sink, train
from arvideo_ds.train.metrics import Console, JsonLines, Wandb
from arvideo_ds.train.settle import Options, Settings
from arvideo_ds.train.validation import (
    DetectionValidation,
    OnlineProbe,
    TokenizerValidation,
    Validation,
)

# How long the indices of a shard set are compared with the manifest before a run begins.
_CHECK_S = 120

Task = Pretrain | Finetune | Detect | TrainTokenizer


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
    folder = options.folder
    if world.device.type == "cpu" and settings.recipe.train.precision == "fp16":
        raise UserError("DeepSpeed has no fp16 on a CPU; use train.precision=bf16 or fp32.")
    with ExitStack() as held:
        if world.is_main:
            held.enter_context(run_folder.lock(folder))
        _check_data(settings, shards, world)
        heartbeat = held.enter_context(
            Heartbeat(
                folder, rank=world.rank, size=world.size, stall_s=settings.recipe.train.stall_s
            )
        )
        checkpoint = _checkpoint(options, settings, shards)
        first_step = 0 if checkpoint is None else checkpoint.step
        engine = _engine(settings, shards, world, first=checkpoint is None)
        if checkpoint is not None:
            load_checkpoint(engine, checkpoint)
        loader = _loader(settings, shards, world, first_step, folder)
        facts = {
            **record.facts(settings, shards, world.size),
            PARENT: parent_facts(folder, checkpoint),
            BASELINE: None if checkpoint is None else checkpoint.facts.get(BASELINE),
        }
        validation = _validation(settings, engine, world, folder, first_step)
        if world.is_main:
            run_folder.write_recipe(folder, settings.recipe)
            run_folder.write_facts(folder, facts)
            if isinstance(settings.recipe, FinetuneRecipe):
                names = shards.manifest.class_names(settings.recipe.heads)
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
                sinks=_sinks(settings, folder, first_step, held) if world.is_main else [],
                hosts=gather_names(socket.gethostname()),
                heartbeat=heartbeat,
                guard=_guard(settings, loader, world, first_step, folder),
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
                _export(folder, settings.recipe)
            elapsed_s = time.monotonic() - started
            record.summarize(
                options, settings, shards, outcome, first_step, elapsed_s, facts[BASELINE]
            )
    dist.barrier()
    interrupt.disconnect()
    dist.destroy_process_group()
    return EXIT_INTERRUPTED if outcome.interrupted else EXIT_OK


def _check_data(settings: Settings[Any], shards: ShardSet, world: World) -> None:
    """Whether the files are those of the manifests: one rank of each machine looks, all are told.

    Behind a URL they are the same for all machines. Collective. Errors: `UserError`, on every rank.
    """
    sets = [each for each in (shards, settings.validation) if each is not None]
    error = ""
    try:
        for each in sets:
            if world.is_main if each.is_remote else world.local_rank == 0:
                checked, total = each.check(limit_s=_CHECK_S), len(each.manifest.shards)
                if checked < total and world.is_main:
                    print(
                        f"note: {checked} of {total} indices of {each.name} are what the manifest "
                        f"says; the others are checked when they are read ({_CHECK_S} s are over).",
                        flush=True,
                    )
        if world.local_rank == 0 and settings.recipe.data.scores is not None:
            TokenScores(settings.recipe.data.scores).check_sizes()
    except UserError as found:
        error = str(found)
    if error := next(filter(None, gather_names(error)), ""):
        raise UserError(error)


def _checkpoint(options: Options, settings: Settings[Any], shards: ShardSet) -> Checkpoint | None:
    """What to go on from: the run's own newest checkpoint, else that of --resume, else nothing.

    Collective: the ranks share the work of verifying it.
    """
    own = newest_sound_checkpoint(options.folder / run_folder.CHECKPOINTS, own=True)
    if own is None and options.resume is None:
        return None
    found = own
    if found is None:
        parent = Path(options.resume or "")
        found = newest_sound_checkpoint(parent / run_folder.CHECKPOINTS, own=False)
    if found is None:
        raise UserError(f"--resume {options.resume}: that run holds no complete checkpoint.")
    if found.facts.get("manifest") != shards.hash:
        raise UserError(
            f"checkpoint {found.path} was trained on other shards than {shards.name}: the "
            "manifest differs, so its position in the data means nothing here. Point data.shards "
            "at the shards it was started with, or start another run with another --output."
        )
    recipe = settings.recipe
    if own is not None:
        run_folder.require_same_rates(own.path, own.facts.get("plan"), settings.plan)
    if own is not None and found.facts.get("scores") != hash_of_scores(recipe):
        raise UserError(
            f"checkpoint {found.path} was trained with other token scores than data.scores="
            f"{recipe.data.scores}: scores.json differs. Point data.scores at those, or start "
            "another run with another --output."
        )
    return found


def _engine(settings: Settings[Any], shards: ShardSet, world: World, *, first: bool) -> Engine:
    recipe = settings.recipe
    # Every rank draws the same initial weights.
    torch.manual_seed(recipe.train.seed)
    task, transfer = _task(recipe, shards), recipe.transfer
    source = transfer and transfer.init_from
    if first and source is not None and isinstance(task, Finetune | Detect):
        same = _same_classes(Path(source), recipe, shards)
        report = load_classifier_weights(task.model, source, patch=recipe.patch, same_classes=same)
        if world.is_main:
            print(report, flush=True)
    engine = build_engine(
        task,
        _groups(task, recipe),
        settings.deepspeed,
        betas=recipe.optim.betas,
        implementation=recipe.optim.implementation,
        compiled=recipe.train.compile,
    )
    if recipe.ema_decay is not None:
        keep_average(engine, recipe.ema_decay)
    return engine


def _same_classes(source: Path, recipe: Recipe, shards: ShardSet) -> bool | None:
    """Whether weights to begin with are of the same classes; None where they do not say theirs."""
    if not isinstance(recipe, FinetuneRecipe):
        return False  # actions in boxes are other outputs than a clip's classes
    names = read_labels(source if source.is_dir() else source.parent)
    if names is None:
        return None
    # As lists: the logits of label sets stand in their order.
    own = by_set(shards.manifest.class_names(recipe.heads))
    return list(by_set(names).items()) == list(own.items())


def _task(recipe: Recipe, shards: ShardSet) -> Task:
    if isinstance(recipe, FinetuneRecipe):
        names = by_set(shards.manifest.class_names(recipe.heads))
        return Finetune(recipe, *map(len, names.values()))
    if isinstance(recipe, DetectRecipe):
        return Detect(recipe)
    if isinstance(recipe, TokenizerRecipe):
        return TrainTokenizer(recipe)
    assert isinstance(recipe, PretrainRecipe)
    return Pretrain(recipe)


def _groups(task: Task, recipe: Recipe) -> list[dict[str, Any]]:
    layer_decay = 1.0 if recipe.transfer is None else recipe.transfer.layer_decay
    return parameter_groups(task, recipe.optim.weight_decay, layer_decay=layer_decay)


_VALIDATIONS: dict[str, type[Validation]] = {
    "pretrain": OnlineProbe,
    "finetune": Validation,
    "detect": DetectionValidation,
    "tokenizer": TokenizerValidation,
}


def _validation(
    settings: Settings[Any], engine: Engine, world: World, folder: Path, first_step: int
) -> Validation | None:
    shards = settings.validation
    if shards is None:
        return None
    kind = _VALIDATIONS[settings.recipe.task]
    validation = kind(engine, settings.recipe, settings.plan, shards, world, folder, first_step)
    if world.is_main:
        # An earlier start may have been killed between its last save and this.
        last = {m["step"]: m for m in run_folder.read_metrics(folder)}.get(first_step, {})
        validation.keep_best(first_step, last)
    return validation


def _loader(
    settings: Settings[Any], shards: ShardSet, world: World, first_step: int, folder: Path
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
        **_own_clips(settings.recipe, shards),
    )


def _own_clips(recipe: Recipe, shards: ShardSet) -> dict[str, Any]:
    """What a task loads instead of clips alone."""
    if isinstance(recipe, DetectRecipe):
        return {"clips": TrainKeyframes, "together": collate_keyframes}
    return {"clips": partial(TrainClips, scores=open_scores(shards, recipe))}


def _guard(
    settings: Settings[Any], loader: TrainLoader, world: World, first_step: int, folder: Path
) -> Guard:
    return Guard(
        folder,
        settings.recipe,
        settings.plan,
        rank=world.rank,
        first_step=first_step,
        video_at=loader.video_at,
    )


def _baseline(engine: Engine, facts: dict[str, Any], world: World, folder: Path) -> Baseline:
    def keep(loss: float) -> None:
        facts[BASELINE] = loss  # which every checkpoint is saved with
        if world.is_main:
            run_folder.write_facts(folder, facts)
            print(f"predicting the mean of the targets would give loss {loss:.4f}", flush=True)

    task = engine.module
    return Baseline(facts[BASELINE], task.baseline if isinstance(task, Pretrain) else None, keep)


def _sinks(settings: Settings[Any], folder: Path, first_step: int, held: ExitStack) -> list[Sink]:
    sinks: list[Sink] = [
        Console(settings.plan.steps, settings.recipe.task),
        JsonLines(folder, first_step),
    ]
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


def _export(folder: Path, recipe: Recipe) -> None:
    """The finished run's weights, out of its last checkpoint."""
    checkpoint = newest_checkpoint(folder / run_folder.CHECKPOINTS)
    assert checkpoint is not None, "the loop saves after the last step"
    export_weights(checkpoint.path, folder / run_folder.MODEL, prefix=PREFIX)
    if recipe.ema_decay is not None:
        path = folder / run_folder.EMA_MODEL
        export_weights(checkpoint.path, path, prefix=PREFIX, kind=AVERAGE)
