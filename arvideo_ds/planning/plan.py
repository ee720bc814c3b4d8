"""The run plan: every derived number of a run, computed once, here."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from arvideo_ds.config import Recipe
from arvideo_ds.errors import UserError
from arvideo_ds.planning.cost import cost_of

# Learning rates are given for this number of videos per step (linear scaling rule). Repeated clips
# of a video do not count, as in VideoMAE's and VideoMAE V2's run_mae_pretraining.py and
# run_class_finetuning.py, which scale lr, min_lr and warmup_lr.
BASE_VIDEOS = 256
_TOLERATED_DIFFERENCE = 0.05


@dataclass(frozen=True)
class RunPlan:
    """Batch arithmetic, schedule and cost of one run on `world_size` ranks.

    Batches are clips; `videos_per_step` = `total_batch` / repeats. `steps` are optimiser steps.
    `sequence_parallel` consecutive ranks load the same clips and share their tokens; the batch is
    divided among these `data_ranks` groups. `dropped_share`: of the tokens that the encoder could
    see; None for objectives that drop none.
    """

    world_size: int
    sequence_parallel: int
    num_videos: int
    num_videos_from: str
    total_batch: int
    micro_batch: int
    accumulation: int
    repeats: int
    videos_per_step: int
    steps: int
    warmup_steps: int
    epochs: float
    lr: float
    warmup_lr: float
    min_lr: float
    clip_shape: tuple[int, int, int]
    token_grid: tuple[int, int, int]
    num_tokens: int
    num_clusters: int
    cluster_size: int
    encoder_tokens: int
    decoder_queries: int
    dropped_share: float | None
    parameters_encoder: int
    parameters_decoder: int
    gflops_forward_per_clip: float

    @property
    def data_ranks(self) -> int:
        return self.world_size // self.sequence_parallel

    def data_rank(self, rank: int) -> int:
        """The index, below `data_ranks`, of the share of clips that a rank loads."""
        return rank // self.sequence_parallel

    def as_dict(self) -> dict[str, object]:
        return dataclasses.asdict(self)


def make_plan(
    recipe: Recipe, *, world_size: int, num_videos: int | None = None, sequence_parallel: int = 1
) -> RunPlan:
    """Solve batch, accumulation, steps and learning rate for a number of ranks.

    num_videos: the manifest's count; by default `data.num_videos`.
    Errors: `UserError` when the batch or the streams cannot be divided evenly among the ranks, or
    tokens and heads among the `sequence_parallel` ranks of a group.
    """
    _check_groups(recipe, world_size, sequence_parallel)
    micro_batch, accumulation = _solve_batch(recipe, world_size, sequence_parallel)
    count = recipe.data.num_videos if num_videos is None else num_videos
    if count is None:
        raise UserError(
            "the number of videos is unknown: there are no shards yet and the recipe has no "
            "data.num_videos. Make the shards (`arvideo shards`) or set data.num_videos."
        )
    train, optim, geometry, counts = recipe.train, recipe.optim, recipe.geometry, recipe.counts
    videos_per_step = train.total_batch // recipe.data.repeats
    steps, warmup_steps = train.max_steps, optim.warmup_steps
    if steps is None:
        steps = max(1, round((train.epochs or 0) * count / videos_per_step))
    if warmup_steps is None:
        warmup_steps = round(optim.warmup_epochs * count / videos_per_step)
    scale, cost = videos_per_step / BASE_VIDEOS, cost_of(recipe)
    return RunPlan(
        world_size=world_size,
        sequence_parallel=sequence_parallel,
        num_videos=count,
        num_videos_from="data.num_videos" if num_videos is None else "manifest",
        total_batch=train.total_batch,
        micro_batch=micro_batch,
        accumulation=accumulation,
        repeats=recipe.data.repeats,
        videos_per_step=videos_per_step,
        steps=steps,
        warmup_steps=warmup_steps,
        epochs=round(steps * videos_per_step / count, 3),
        lr=optim.base_lr * scale,
        warmup_lr=optim.warmup_lr * scale,
        min_lr=optim.min_lr * scale,
        clip_shape=geometry.clip,
        token_grid=geometry.grid,
        num_tokens=geometry.num_tokens,
        num_clusters=geometry.num_clusters,
        cluster_size=geometry.cluster_size,
        encoder_tokens=counts.encoded,
        decoder_queries=counts.predicted,
        dropped_share=counts.dropped_share,
        parameters_encoder=cost.parameters_encoder,
        parameters_decoder=cost.parameters_decoder,
        gflops_forward_per_clip=round(cost.flops_forward_per_clip / 1e9, 3),
    )


def notes(recipe: Recipe, plan: RunPlan) -> list[str]:
    """Settings that are allowed but probably not intended, a sentence each."""
    lines = []
    if plan.warmup_steps >= plan.steps:
        lines.append("the warm-up is longer than the run; set optim.warmup_steps.")
    if plan.videos_per_step > plan.num_videos:
        lines.append(
            f"a step takes {plan.videos_per_step} videos, and there are {plan.num_videos}: the "
            f"run has {plan.steps} steps. Lower train.total_batch, or set train.max_steps."
        )
    lines += recipe.notes()
    expected = recipe.data.num_videos
    if expected and abs(plan.num_videos - expected) > _TOLERATED_DIFFERENCE * expected:
        lines.append(f"the recipe expects {expected} videos, the shards have {plan.num_videos}.")
    return lines


def _check_groups(recipe: Recipe, world_size: int, sequence_parallel: int) -> None:
    if sequence_parallel == 1:
        return
    model = recipe.transformer
    if model is None:
        raise UserError(
            f"sequence_parallel_size={sequence_parallel} in the DeepSpeed JSON is only for "
            f"transformers, not for task={recipe.task}. Use another JSON."
        )
    if world_size % sequence_parallel:
        raise UserError(
            f"{world_size} rank(s) cannot form whole groups of sequence_parallel_size="
            f"{sequence_parallel} (DeepSpeed JSON). Use a multiple of {sequence_parallel} ranks, "
            "or a size that divides their number."
        )
    heads = model.size.heads
    if heads % sequence_parallel:
        raise UserError(
            f"sequence_parallel_size={sequence_parallel} in the DeepSpeed JSON divides the heads "
            f"of attention among the ranks of a group, and model.size={model.name} has {heads}. "
            f"Use one of {', '.join(str(n) for n in range(1, heads + 1) if heads % n == 0)}."
        )


def _solve_batch(recipe: Recipe, world_size: int, group: int) -> tuple[int, int]:
    """The largest micro-batch up to train.micro_batch that divides the rank's share."""
    data_ranks, streams = world_size // group, recipe.data.num_streams
    who = "ranks" if group == 1 else f"groups of {group} ranks"
    if streams % data_ranks:
        raise UserError(
            f"{data_ranks} {who} cannot share data.num_streams={streams} evenly. Use a number of "
            f"{who} that divides {streams}, or start the run with data.num_streams="
            f"{math.lcm(streams, data_ranks)} (fixed for the whole run)."
        )
    total, limit, repeats = recipe.train.total_batch, recipe.train.micro_batch, recipe.data.repeats
    if total % (data_ranks * repeats):
        step = data_ranks * repeats
        below, above = total // step * step, -(-total // step) * step
        near = " or ".join(str(n) for n in (below, above) if n)
        raise UserError(
            f"train.total_batch={total} cannot be divided among {data_ranks} {who} x data.repeats="
            f"{repeats}. Use {near}, or another number of {who}."
        )
    per_rank = total // data_ranks
    fits = [m for m in range(repeats, min(limit, per_rank) + 1, repeats) if per_rank % m == 0]
    if not fits:
        raise UserError(
            f"train.micro_batch={limit} is smaller than data.repeats={repeats}: the clips of one "
            "video are in one micro-batch. Raise train.micro_batch or lower data.repeats."
        )
    return fits[-1], per_rank // fits[-1]
