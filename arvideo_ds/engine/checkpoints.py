"""Checkpoints on disk: complete or absent, and valid for any number of ranks and ZeRO stage.

    <run>/checkpoints/
      step-00000500/           renamed to this name only when every rank has written
        rank-00003.safetensors   this rank's part of weights and moments (saved_state.py)
        run.json                 the facts of the run (step, recipe, plan, versions, ...), the
                                 engine's counters, size and SHA-256 of every file and of this text
      .partial-step-00001000/  an interrupted save; removed by the next one
      latest                   name of the newest complete checkpoint, replaced atomically

DeepSpeed's own files fit the same ranks and stage only, and its universal format neither stage 0
nor a change between stages 0, 1-2 and 3 (0.19.8); these are by parameter.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn

from arvideo_ds.engine.agreement import gather_objects
from arvideo_ds.engine.build import Engine
from arvideo_ds.engine.fragments import (
    AVERAGE,
    WEIGHT,
    base_optimizer,
    fragments,
    owners,
    spread_weights,
    state_of,
)
from arvideo_ds.engine.saved_state import SavedState, file_of_rank, write_state
from arvideo_ds.errors import UserError
from arvideo_ds.files.atomic import finite, replacing, write_json, write_text
from arvideo_ds.files.checksums import changed_files, sha256_of, sha256_of_facts
from arvideo_ds.files.tensors import save_tensors
from arvideo_ds.optim.state import make_state, steps_applied

_PARTIAL, _PREFIX, _MARKER, _LATEST = ".partial-", "step-", "run.json", "latest"
_ENGINE = "engine"
# Hashes of the ranks' files, and of everything else in the marker.
_HASHES, _OWN_HASH = "sha256", "sha256_of_this"
_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its folder, step, and the facts saved with it."""

    path: Path
    step: int
    facts: dict[str, Any]


def save_checkpoint(
    engine: Engine, folder: Path, step: int, facts: dict[str, Any], *, keep: int
) -> None:
    """Save after `step` optimiser steps, then keep the newest `keep` complete ones. Collective.

    Errors: `UserError` on every rank when one could not write; earlier checkpoints stay.
    """
    name = f"{_PREFIX}{step:08d}"
    final, partial = folder / name, folder / (_PARTIAL + name)
    if _complete(final) is not None:
        return
    if dist.get_rank() == 0:
        # Makes room: surplus checkpoints, and interrupted saves.
        _prune(folder, keep)
    dist.barrier()
    tensors = _rank_state(engine)
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    _agree(partial, step, lambda: _require_room(partial, num_bytes * dist.get_world_size()))
    digests = _agree(partial, step, lambda: _write(partial, engine, tensors))
    hashes = {file_of_rank(partial, rank).name: sha256 for rank, sha256 in enumerate(digests)}
    facts = {"step": step, **facts, _ENGINE: _counters(engine), _HASHES: hashes}
    _agree(partial, step, lambda: _finish(partial, final, facts))
    if dist.get_rank() == 0:
        write_text(folder / _LATEST, name)
        _prune(folder, keep)
    dist.barrier()


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint with all its files in full size; reads none of them."""
    paths = sorted(folder.glob(_PREFIX + "*"), reverse=True)
    return next(filter(None, map(_complete, paths)), None)


def newest_sound_checkpoint(folder: Path, *, own: bool) -> Checkpoint | None:
    """The newest checkpoint whose files have the hashes that were saved. Collective.

    Each rank hashes its share of the files. Damaged checkpoints are skipped with a note; in the
    run's `own` folder they lose their marker and so count as incomplete from now on. Errors:
    `UserError` on every rank when there are checkpoints and none is sound.
    """
    # By the first rank's list: a file system may show other ranks an older state.
    paths = sorted(folder.glob(_PREFIX + "*"), reverse=True)
    damaged: dict[str, str] = {}
    for name in gather_objects([path.name for path in paths])[0]:
        checkpoint = _complete(folder / name)
        share = _damage(checkpoint, rank=dist.get_rank(), size=dist.get_world_size())
        damage = sorted({text for text in gather_objects(share) if text})
        if not damage:
            assert checkpoint is not None, "an incomplete one is damaged"
            if dist.get_rank() == 0:
                _report(checkpoint, damaged, own=own)
            return checkpoint
        damaged[name] = ", ".join(damage)
    if damaged:
        listed = "; ".join(f"{name}: {damage}" for name, damage in damaged.items())
        raise UserError(
            f"no checkpoint in {folder} is sound ({listed}). Restore one from a copy, or remove "
            f"{folder} to start from the first step."
        )
    return None


def load_frozen(module: nn.Module, checkpoint: Checkpoint) -> None:
    """Load the weights that are not trained, before `build_engine` takes the module.

    Errors: `UserError` when it is of another model.
    """
    saved = SavedState(checkpoint.path)
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            values = saved.read(name, WEIGHT, 0, parameter.numel())
            parameter.data.copy_(values.view(parameter.shape))


def load_checkpoint(engine: Engine, checkpoint: Checkpoint) -> None:
    """Load weights, moments, counters and loss scale, at any ranks and stage. Collective.

    Weights that are not trained: `load_frozen`.

    Errors: `UserError` when it is of another model.
    """
    saved, shapes = SavedState(checkpoint.path), _shapes(engine)
    if shapes != saved.shapes:
        names = sorted(shapes.items() ^ saved.shapes.items())
        raise UserError(
            f"checkpoint {saved.folder} is of another model: {len(names)} parameters differ, "
            f"among them {names[0][0]}."
        )
    counters = checkpoint.facts[_ENGINE]
    moments = [kind for kind in saved.kinds if kind not in (WEIGHT, AVERAGE)]
    if moments:
        make_state(base_optimizer(engine), owners(engine), moments, counters["steps_applied"])
    for fragment in fragments(engine):
        for kind, values in state_of(engine, fragment).items():
            values.copy_(saved.read(fragment.name, kind, fragment.start, fragment.length))
    spread_weights(engine)
    _set_counters(engine, counters)


def export_weights(
    checkpoint: Path,
    path: Path,
    *,
    prefix: str,
    kind: str = WEIGHT,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
) -> None:
    """Write the whole fp32 weights below `prefix` as safetensors, atomically. One process calls it.

    kind: WEIGHT or AVERAGE. change: makes what is written of the weights, without the prefix.
    Errors: `UserError` where the checkpoint is damaged or has none.
    """
    if damage := _damage(_complete(checkpoint), rank=0, size=1):
        raise UserError(
            f"checkpoint {checkpoint} is damaged ({damage}). Give the training command again: it "
            "continues from the newest sound checkpoint."
        )
    weights = SavedState(checkpoint).weights(prefix, kind)
    if not weights:
        raise UserError(f"checkpoint {checkpoint} has no weights named {prefix}*.")
    with replacing(path) as partial:
        save_tensors(change(weights), partial)


def _rank_state(engine: Engine) -> dict[tuple[str, int, str], Tensor]:
    """This rank's part of the state by parameter, start and kind, on the CPU."""
    rank, size = dist.get_rank(), dist.get_world_size()
    tensors = {}
    for number, fragment in enumerate(fragments(engine)):
        # At stage 0 all ranks have the same state; each writes a share.
        if engine.stage == 0 and number % size != rank:
            continue
        for kind, values in state_of(engine, fragment).items():
            # A copy: views share storage, and training continues in it.
            tensors[fragment.name, fragment.start, kind] = values.float().cpu().clone()
    frozen = {(name, start, WEIGHT): piece for name, (start, piece) in engine.frozen.items()}
    return {**tensors, **{key: piece for key, piece in frozen.items() if len(piece)}}


def _shapes(engine: Engine) -> dict[str, tuple[int, ...]]:
    # Stage 3 leaves an empty tensor in a parameter's place.
    parameters = engine.module.named_parameters()
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in parameters}


def _counters(engine: Engine) -> dict[str, Any]:
    scale = vars(_loss_scaler(engine) or SimpleNamespace())
    return {
        **{name: getattr(engine.deepspeed, name) for name in _COUNTERS},
        "steps_applied": steps_applied(base_optimizer(engine)),
        "loss_scale": {k: v for k, v in scale.items() if isinstance(v, int | float)},
    }


def _set_counters(engine: Engine, counters: dict[str, Any]) -> None:
    for name in _COUNTERS:
        setattr(engine.deepspeed, name, counters[name])
    # Checkpoints are between steps; another number of ranks may accumulate differently.
    accumulation = engine.deepspeed.gradient_accumulation_steps()
    engine.deepspeed.micro_steps = counters["global_steps"] * accumulation
    for name, value in counters["loss_scale"].items():
        setattr(_loss_scaler(engine), name, value)


def _loss_scaler(engine: Engine) -> Any:
    if not engine.config["fp16"]["enabled"]:
        return None
    optimizer = engine.deepspeed.optimizer
    return getattr(optimizer, "loss_scaler", None) or optimizer.loss_scale_config


def _require_room(partial: Path, num_bytes: int) -> None:
    partial.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(partial).free
    if free < num_bytes:
        gib = 2**30
        raise OSError(f"it needs about {num_bytes / gib:.2f} GiB, {free / gib:.2f} GiB are free")


def _write(partial: Path, engine: Engine, tensors: dict[tuple[str, int, str], Tensor]) -> str:
    path = file_of_rank(partial, dist.get_rank())
    write_state(path, tensors, _shapes(engine))
    with path.open("rb") as file, ThreadPoolExecutor(1) as pool:
        # The disk writes while the processor hashes.
        on_disk = pool.submit(os.fsync, file.fileno())
        digest = sha256_of(path)
        on_disk.result()
    return digest


def _agree(partial: Path, step: int, action: Callable[[], Any]) -> list[Any]:
    """The results of an action on every rank; if it fails on one, all raise. Collective."""
    failure, result = "", None
    try:
        result = action()
    except (OSError, SafetensorError) as error:
        failure = str(error) or type(error).__name__
    outcomes = gather_objects((failure, result))
    failures = [(rank, text) for rank, (text, _) in enumerate(outcomes) if text]
    if not failures:
        return [result for _, result in outcomes]
    rank, text = failures[0]
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
    newest = newest_checkpoint(partial.parent)
    raise UserError(
        f"the checkpoint of step {step} could not be written to {partial.parent} (rank {rank}: "
        f"{text}). "
        + (f"That of step {newest.step} is intact. " if newest else "")
        + "Make room there and give the same command again; train.keep_checkpoints sets how many "
        "are kept."
    )


def _finish(partial: Path, final: Path, facts: dict[str, Any]) -> None:
    if dist.get_rank() != 0:
        return
    if final.exists():  # a damaged one of the same step
        shutil.rmtree(final)
    files = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
    facts = finite({**facts, "files": files})
    write_json(partial / _MARKER, {**facts, _OWN_HASH: sha256_of_facts(facts)})
    partial.rename(final)


def _complete(path: Path) -> Checkpoint | None:
    """The checkpoint, if its marker is as written and every file has its size."""
    try:
        facts: dict[str, Any] = json.loads((path / _MARKER).read_text())
        own_hash = facts.pop(_OWN_HASH, None)
        intact = all((path / name).stat().st_size == size for name, size in facts["files"].items())
        hashed = own_hash is not None or _HASHES in facts  # earlier versions hashed nothing
        if not intact or (hashed and own_hash != sha256_of_facts(facts)):
            return None
        return Checkpoint(path, int(facts["step"]), facts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _damage(checkpoint: Checkpoint | None, *, rank: int, size: int) -> str:
    """The damage in a rank's share of the files; files without hashes count as sound."""
    if checkpoint is None:
        return f"{_MARKER} is damaged, or a file is missing or cut short"
    hashes = checkpoint.facts.get(_HASHES, {})
    changed = changed_files(checkpoint.path, hashes, sorted(hashes)[rank::size])
    return ", ".join(f"{name} is not what was written" for name in changed)


def _report(checkpoint: Checkpoint, damaged: Mapping[str, str], *, own: bool) -> None:
    """Print which checkpoints were skipped; in the run's own folder make them incomplete."""
    for name, damage in damaged.items():
        skipped = checkpoint.path.with_name(name)
        print(f"note: checkpoint {skipped} is damaged ({damage}): skipped.", flush=True)
        if own and (skipped / _MARKER).is_file():
            (skipped / _MARKER).rename(skipped / f"{_MARKER}.damaged")
    if _HASHES not in checkpoint.facts:
        print(
            f"note: checkpoint {checkpoint.path} was saved without hashes, by an earlier version: "
            "it cannot be verified.",
            flush=True,
        )


def _prune(folder: Path, keep: int) -> None:
    for path in folder.glob(_PARTIAL + "*"):
        shutil.rmtree(path)
    paths = sorted(folder.glob(_PREFIX + "*"))
    kept = [path for path in paths if _complete(path) is not None][-keep:]
    for path in paths:
        if path not in kept:
            shutil.rmtree(path)
