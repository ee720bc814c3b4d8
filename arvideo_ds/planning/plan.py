"""The run plan: every derived number of a run, computed once, here."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from arvideo_ds.config import Recipe
from arvideo_ds.config.sources import source_names
from arvideo_ds.errors import UserError
from arvideo_ds.planning.cost import cost_of

# Learning rates are given for this number of videos per step (linear scaling rule). Repeated clips
# of a video do not count, as in VideoMAE's and VideoMAE V2's run_mae_pretraining.py and
# run_class_finetuning.py, which scale lr, min_lr and warmup_lr.
BASE_VIDEOS = 256
_TOLERATED_DIFFERENCE = 0.05
# A source of a mixture that is repeated so many times as often as the whole mixture is noted.
_REPEATED = 10


@dataclass(frozen=True)
class SourcePlan:
    """A source of a mixture. share: of the videos of each step. epochs: over its own videos, in the
    whole run. protocol: settings of data that hold for it."""

    name: str
    shards: str
    videos: int
    share: float
    epochs: float
    protocol: dict[str, Any]


@dataclass(frozen=True)
class PhasePlan:
    """Steps first_step..end_step-1 (from 0) of a run, which begin at run position `first_video`.

    plan: the numbers that hold in them; steps, warm-up and epochs are those of the whole run.
    """

    number: int
    first_step: int
    end_step: int
    first_video: int
    plan: RunPlan

    def videos_before(self, step: int) -> int:
        """The run position at which a step of this phase begins, or the phase ends."""
        return self.first_video + (step - self.first_step) * self.plan.videos_per_step

    def as_dict(self) -> dict[str, object]:
        return {**vars(self), "plan": self.plan.as_dict()}


@dataclass(frozen=True)
class RunPlan:
    """Batch arithmetic, schedule and cost of one run on `world_size` ranks.

    Batches are clips; `videos_per_step` = `total_batch` / repeats. `steps` are optimiser steps.
    `sequence_parallel` consecutive ranks load the same clips and share their tokens; the batch is
    divided among these `data_ranks` groups. `dropped_share`: of the tokens that the encoder could
    see; None for objectives that drop none. With `phases`, the numbers are those of the last one.
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
    schedule: str
    decay_steps: int
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
    gflops_teacher_per_clip: float = 0.0
    sources: tuple[SourcePlan, ...] = ()
    phases: tuple[PhasePlan, ...] = ()
    # None: all.
    parameters_trained: int | None = None

    @property
    def parts(self) -> tuple[PhasePlan, ...]:
        """The phases; a run without them is one."""
        return self.phases or (PhasePlan(0, 0, self.steps, 0, self),)

    def part_at(self, step: int) -> PhasePlan:
        """The phase of a step 0..steps-1; the last one after them."""
        return next((part for part in self.parts if step < part.end_step), self.parts[-1])

    def videos_before(self, step: int) -> int:
        """Number of videos before a step 0..steps: its run position."""
        return self.part_at(step).videos_before(step)

    def parameter_words(self) -> str:
        """The numbers of parameters, and the trained share where it is not the whole."""
        words = f"{self.parameters_encoder / 1e6:.1f} M encoder"
        if self.parameters_decoder:
            words += f" + {self.parameters_decoder / 1e6:.1f} M decoder"
        if self.parameters_trained is None:
            return f"{words} parameters"
        share = self.parameters_trained / (self.parameters_encoder + self.parameters_decoder)
        return f"{words} parameters, {self.parameters_trained:,} ({share:.2%}) trained"

    @property
    def data_ranks(self) -> int:
        return self.world_size // self.sequence_parallel

    def data_rank(self, rank: int) -> int:
        """The index, below `data_ranks`, of the share of clips that a rank loads."""
        return rank // self.sequence_parallel

    def as_dict(self) -> dict[str, object]:
        tree = dataclasses.asdict(replace(self, phases=()))
        tree["phases"] = [phase.as_dict() for phase in self.phases]
        optional = ("sources", "phases", "gflops_teacher_per_clip", "parameters_trained")
        return {key: value for key, value in tree.items() if value or key not in optional}


def make_plan(
    recipe: Recipe,
    *,
    world_size: int,
    num_videos: int | Mapping[str, int] | None = None,
    sequence_parallel: int = 1,
) -> RunPlan:
    """Solve batch, accumulation, steps and learning rate for a number of ranks.

    num_videos: the manifest's count, of a mixture by the names of its sources; by default
    `data.num_videos`, and those of data.sources.
    Phases share the steps, so that the schedule is one of the whole run; a phase with another batch
    has another learning rate (linear scaling rule). Warm-up epochs are counted in steps of the
    first phase.
    Errors: `UserError` when the batch or the streams cannot be divided evenly among the ranks, or
    tokens and heads among the `sequence_parallel` ranks of a group.
    """
    _check_groups(recipe, world_size, sequence_parallel)
    given = _expected_videos(recipe) if num_videos is None else num_videos
    if given is None:
        raise UserError(
            "the number of videos is unknown: there are no shards yet and the recipe has no "
            "data.num_videos (or a source has none). Make the shards (`arvideo shards`) or set it."
        )
    count = sum(given.values()) if isinstance(given, Mapping) else given
    train, optim, phases = recipe.train, recipe.optim, recipe.by_phase()
    videos_per_step = [_videos_per_step(phase) for phase in phases]
    steps, warmup_steps = train.max_steps, optim.warmup_steps
    if steps is None:
        mean = sum(map(math.prod, zip(recipe.phase_shares, videos_per_step, strict=True)))
        steps = max(1, round((train.epochs or 0) * count / mean))
    if warmup_steps is None:
        warmup_steps = round(optim.warmup_epochs * count / videos_per_step[0])
    ends = _ends(recipe, steps)
    firsts = [0, *ends[:-1]]
    lengths = [end - first for first, end in zip(firsts, ends, strict=True)]
    videos = [n * per_step for n, per_step in zip(lengths, videos_per_step, strict=True)]
    plans = [
        _plan_of(
            phase,
            num_videos_from="data.num_videos" if num_videos is None else "manifest",
            world_size=world_size,
            sequence_parallel=sequence_parallel,
            num_videos=count,
            steps=steps,
            warmup_steps=warmup_steps,
            epochs=round(sum(videos) / count, 3),
            sources=_sources(recipe, given, sum(videos)),
        )
        for phase in phases
    ]
    if len(plans) == 1:
        return plans[0]
    parts = [
        PhasePlan(number, first, end, sum(videos[:number]), plan)
        for number, (first, end, plan) in enumerate(zip(firsts, ends, plans, strict=True))
    ]
    return replace(plans[-1], phases=tuple(parts))


def _videos_per_step(recipe: Recipe) -> int:
    return recipe.train.total_batch // recipe.data.repeats


def _ends(recipe: Recipe, steps: int) -> list[int]:
    """The step at which each phase ends. Errors: `UserError` for a phase without steps."""
    # Rounded: the sum of the shares may be a little less than 1.
    ends = [round(steps * share) for share in itertools.accumulate(recipe.phase_shares)]
    for number, (first, end) in enumerate(itertools.pairwise([0, *ends])):
        if first == end:
            raise UserError(
                f"phases.{number} has no step: a share of {recipe.phase_shares[number]:g} of "
                f"{steps} steps. Raise its share, or make the run longer."
            )
    return ends


def _plan_of(
    recipe: Recipe, *, world_size: int, sequence_parallel: int, steps: int, **of_the_run: Any
) -> RunPlan:
    """The plan with the clips and the batch of a recipe without phases."""
    micro_batch, accumulation = _solve_batch(recipe, world_size, sequence_parallel)
    optim, geometry, counts = recipe.optim, recipe.geometry, recipe.counts
    scale, cost = _videos_per_step(recipe) / BASE_VIDEOS, cost_of(recipe)
    return RunPlan(
        world_size=world_size,
        sequence_parallel=sequence_parallel,
        total_batch=recipe.train.total_batch,
        micro_batch=micro_batch,
        accumulation=accumulation,
        repeats=recipe.data.repeats,
        videos_per_step=_videos_per_step(recipe),
        schedule=optim.schedule,
        decay_steps=round(optim.decay_share * steps) if optim.schedule == "wsd" else 0,
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
        parameters_trained=cost.parameters_trained,
        gflops_teacher_per_clip=round(cost.flops_teacher_per_clip / 1e9, 3),
        steps=steps,
        **of_the_run,
    )


def _expected_videos(recipe: Recipe) -> int | dict[str, int] | None:
    """Published counts, by source for a mixture; None if one is not given."""
    sources = recipe.data.sources
    if sources is None:
        return recipe.data.num_videos
    counts = [source.num_videos for source in sources if source.num_videos is not None]
    names = source_names(sources)
    return dict(zip(names, counts, strict=True)) if len(counts) == len(names) else None


def _sources(
    recipe: Recipe, videos: int | Mapping[str, int], run_videos: int
) -> tuple[SourcePlan, ...]:
    sources = recipe.data.sources
    if sources is None or not isinstance(videos, Mapping):
        return ()
    total = sum(source.weight for source in sources)
    plans = []
    for number, (source, (name, count)) in enumerate(zip(sources, videos.items(), strict=True)):
        share, data = source.weight / total, recipe.data.of_source(number)
        keys = ("sampling", "stride", "fps", "crop", "flip", *source.own)
        protocol = {key: v for key in keys if (v := getattr(data, key)) is not None}
        epochs = round(run_videos * share / count, 3)
        plans.append(SourcePlan(name, source.shards, count, round(share, 6), epochs, protocol))
    return tuple(plans)


def batch_words(plan: RunPlan) -> str:
    """Videos and clips of a step, and how the ranks share them."""
    shares = f"{plan.world_size} rank(s)"
    if plan.sequence_parallel > 1:
        shares = f"{plan.data_ranks} group(s) of {plan.sequence_parallel} ranks"
    return (
        f"step {plan.videos_per_step} videos x {plan.repeats} clips = {plan.total_batch} clips = "
        f"{shares} x {plan.micro_batch} x {plan.accumulation} accumulated"
    )


def schedule_words(plan: RunPlan) -> str:
    """The learning rate in the course of the run."""
    after = f"then down to {plan.min_lr:.3e}"
    if plan.schedule == "constant":
        after = "then constant"
    elif plan.schedule == "wsd":
        after = f"then constant, in the last {plan.decay_steps} steps down to {plan.min_lr:.3e}"
    return (
        f"lr for {plan.videos_per_step} videos per step: warm-up from {plan.warmup_lr:.3e} to "
        f"{plan.lr:.3e}, {after}; {plan.steps} steps = {plan.epochs:g} epochs, "
        f"{plan.warmup_steps} of warm-up"
    )


def source_lines(plan: RunPlan) -> list[str]:
    """The sources of a mixture, a line each."""
    lines = []
    for source in plan.sources:
        protocol = ", ".join(f"{key} {json.dumps(v)}" for key, v in source.protocol.items())
        lines.append(
            f"source {source.name}: {source.videos:,} videos, {source.share:.1%} of the clips, "
            f"{source.epochs:.4g} epochs; {protocol}".replace('"', "")
        )
    return lines


def phase_lines(plan: RunPlan) -> list[str]:
    """The phases of a run, a line each."""
    return [
        f"phase {part.number + 1} of {len(plan.phases)}: steps {part.first_step + 1} to "
        f"{part.end_step}, clips of {_by(part.plan.clip_shape)} = {part.plan.num_tokens} tokens, "
        f"{part.plan.encoder_tokens} of them encoded; {part.plan.total_batch} clips per step, "
        f"{part.plan.micro_batch} x {part.plan.accumulation} accumulated; lr {part.plan.lr:.3e}"
        for part in plan.phases
    ]


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def notes(recipe: Recipe, plan: RunPlan) -> list[str]:
    """Settings that are allowed but probably not intended, a sentence each."""
    lines = []
    if plan.warmup_steps >= plan.steps:
        lines.append(
            f"all {plan.steps} steps are warm-up ({plan.warmup_steps}), so the learning rate does "
            "not reach its peak. Train longer, or set optim.warmup_steps."
        )
    elif plan.warmup_steps + plan.decay_steps > plan.steps:
        lines.append(
            f"the warm-up takes {plan.warmup_steps} of {plan.steps} steps, which leaves less than "
            f"the {plan.decay_steps} of optim.decay_share; lower one of them."
        )
    if plan.videos_per_step > plan.num_videos:
        lines.append(
            f"a step takes {plan.videos_per_step} videos, and there are {plan.num_videos}: the "
            f"run has {plan.steps} steps. Lower train.total_batch, or set train.max_steps."
        )
    lines += dict.fromkeys(note for phase in recipe.by_phase() for note in phase.notes())
    for source in plan.sources:
        if source.epochs > _REPEATED * max(1.0, plan.epochs):
            lines.append(
                f"source {source.name} is repeated {source.epochs:.4g} times, and the mixture as a "
                f"whole {plan.epochs:.4g} times: its weight is high for {source.videos} videos."
            )
    counts = [("the shards have", recipe.data.num_videos, plan.num_videos)]
    for source, own in zip(plan.sources, recipe.data.sources or (), strict=True):
        counts.append((f"source {source.name} has", own.num_videos, source.videos))
    for what, expected, actual in counts:
        if expected and abs(actual - expected) > _TOLERATED_DIFFERENCE * expected:
            lines.append(
                f"the recipe expects {expected} videos; {what} {actual}. The schedule follows the "
                "shards; data.num_videos need not change."
            )
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
    data_ranks, streams = world_size // group, recipe.data.shared_streams
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
