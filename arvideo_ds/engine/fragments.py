"""Which part of every parameter's state this rank has, whatever the ZeRO stage.

DeepSpeed keeps the fp32 weights and the optimiser's moments in flat tensors, cut over the ranks
differently for every stage. Named by parameter and range, the same values fit any stage and any
number of ranks; this is the one file that knows where DeepSpeed keeps them.

    stage 0               the parameter itself, whole on every rank
    stages 1 and 2        one flat fp32 partition per parameter group; a parameter may cross ranks
    stage 3               each parameter cut into world-size pieces, the last one padded
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from arvideo_ds.engine.build import Average, Engine
from arvideo_ds.optim import state

WEIGHT, AVERAGE = "weight", "average"


@dataclass(frozen=True)
class Fragment:
    """Values start..start+length of a flattened parameter; they are in `owner` at `offset`."""

    name: str
    start: int
    length: int
    owner: Tensor
    offset: int


def fragments(engine: Engine) -> Iterator[Fragment]:
    """This rank's fragments; those of all ranks cover every trained parameter."""
    find = _FINDERS[engine.stage]
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            yield from find(engine.deepspeed.optimizer, name, parameter)


def base_optimizer(engine: Engine) -> Any:
    """torch's optimiser inside DeepSpeed's."""
    return getattr(engine.deepspeed.optimizer, "optimizer", engine.deepspeed.optimizer)


def state_of(engine: Engine, fragment: Fragment) -> dict[str, Tensor]:
    """The fragment's weight, average (if kept) and moments (after the first step), as views."""
    whole = {WEIGHT: fragment.owner}
    if engine.average is not None:
        whole[AVERAGE] = engine.average.of(fragment.owner)
    whole |= state.moments(base_optimizer(engine), fragment.owner)
    return {kind: _cut(values, fragment.offset, fragment.length) for kind, values in whole.items()}


def keep_average(engine: Engine, decay: float) -> None:
    """From now on keep a moving average of the weights, which starts at their present values."""
    engine.average = Average(owners(engine), decay)


def follow_average(engine: Engine, followers: Mapping[str, Tensor]) -> None:
    """Copy the moving average, now and after each update, to tensors outside the engine.

    followers: a tensor for each of some parameters, whole, by its name. Collective, and an
    all-reduce of their size in fp32 where ranks have parts.
    """
    engine.spread_average = functools.partial(_copy_average, engine, followers)
    engine.spread_average()


@torch.no_grad()
def _copy_average(engine: Engine, followers: Mapping[str, Tensor]) -> None:
    assert engine.average is not None
    device = engine.deepspeed.device
    flats = {
        name: torch.zeros(follower.numel(), device=device) for name, follower in followers.items()
    }
    for fragment in fragments(engine):
        if fragment.name in flats:
            average = engine.average.of(fragment.owner)
            part = _cut(average, fragment.offset, fragment.length)
            _cut(flats[fragment.name], fragment.start, fragment.length).copy_(part)
    if engine.stage:
        whole = torch.cat(list(flats.values()))
        dist.all_reduce(whole)
        flats = dict(zip(flats, whole.split([len(flat) for flat in flats.values()]), strict=True))
    for name, follower in followers.items():
        follower.copy_(flats[name].view_as(follower))


def owners(engine: Engine) -> list[Tensor]:
    """The tensors that contain this rank's fp32 weights."""
    return list({id(f.owner): f.owner for f in fragments(engine)}.values())


def spread_weights(engine: Engine) -> None:
    """Copy the fp32 weights, after they were written, to the weights that the model uses."""
    optimizer = engine.deepspeed.optimizer
    if engine.stage == 3:
        optimizer.checkpoint_event_prologue()
        for number in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
        optimizer.checkpoint_event_epilogue()
    elif engine.stage:
        optimizer.update_lp_params()


def _cut(values: Tensor, offset: int, length: int) -> Tensor:
    return values.detach().view(-1).narrow(0, offset, length)


def _whole(_: Any, name: str, parameter: Tensor) -> Iterator[Fragment]:
    yield Fragment(name, 0, parameter.numel(), parameter, 0)


def _flat_partition(optimizer: Any, name: str, parameter: Any) -> Iterator[Fragment]:
    mapping = parameter._hp_mapping
    if mapping is None:  # another rank's
        return
    part = mapping.lp_fragment_address
    owner = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
    yield Fragment(name, part.start, part.numel, owner, mapping.hp_fragment_address.start)


def _piece(optimizer: Any, name: str, parameter: Any) -> Iterator[Fragment]:
    group, offset, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = dist.get_rank() * padded
    length = min(padded, parameter.ds_numel - start)
    if length > 0:
        owner = optimizer.fp32_partitioned_groups_flat[group]
        yield Fragment(name, start, length, owner, offset)


_FINDERS = {0: _whole, 1: _flat_partition, 2: _flat_partition, 3: _piece}
