"""Which ZeRO stage, micro-batch and number of GPUs: predictions of a step, compared.

A step is modelled as matrix products and sent bytes, both at given rates, and memory (memory.py).
Nothing overlaps, so times are upper bounds; data, launches and stragglers are not modelled.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace

from arvideo_ds.config import EncoderRecipe
from arvideo_ds.errors import UserError
from arvideo_ds.planning.cost import (
    cost_of,
    encoder_flops,
    forward_passes,
    parameter_sizes,
    trained_sizes,
)
from arvideo_ds.planning.data import Supply, supply
from arvideo_ds.planning.memory import (
    BYTES,
    Footprint,
    Strategy,
    footprint,
    kept_gathered,
    stage_of_run,
)
from arvideo_ds.planning.plan import PhasePlan, RunPlan, make_plan

GIB = 2**30
# The rest is CUDA's context, libraries' workspaces and fragmentation.
USABLE_SHARE = 0.9
# Smaller micro-batches do not fill a GPU: used only where nothing larger fits.
SMALL_MICRO_BATCH = 8
# A higher stage must make the predicted step faster by this factor.
WORTH_IT = 1.1
# Numbers of GPUs in the scaling table end here.
LARGEST = 1024
_COUNTS: dict[float, str] = {0: "no", 1: "one", 2: "two"}
ASSUMED_TFLOPS, ASSUMED_BANDWIDTH_GB_S = 100.0, 20.0


@dataclass(frozen=True)
class Machine:
    """Identical GPUs: memory, achieved matrix-product rate, and sending rate of each."""

    num_gpus: int
    memory_gib: float
    tflops: float
    bandwidth_gb_s: float

    @property
    def usable_bytes(self) -> float:
        return USABLE_SHARE * self.memory_gib * GIB


@dataclass(frozen=True)
class Option:
    """One way to run a recipe on a machine. Times are of one optimiser step on one rank.

    `step_s` is None with offloading: its cost depends on the host, which the plan does not know.
    """

    strategy: Strategy
    micro_batch: int
    accumulation: int
    footprint: Footprint
    sent_bytes: int
    compute_s: float
    communication_s: float
    fits: bool

    @property
    def step_s(self) -> float | None:
        return None if self.strategy.offloads else _seconds(self)


@dataclass(frozen=True)
class PhaseOption:
    """An option in a phase of a run, with the phase's recipe."""

    part: PhasePlan
    recipe: EncoderRecipe
    option: Option

    @property
    def seconds(self) -> float | None:
        step_s = self.option.step_s
        return None if step_s is None else (self.part.end_step - self.part.first_step) * step_s


def sent_bytes(recipe: EncoderRecipe, strategy: Strategy, ranks: int, accumulation: int) -> int:
    """Bytes that a rank sends in a step, by ring collectives: an all-reduce is two passes.

    Stages 1 and 2 all-reduce their gradients (DeepSpeed 0.19's `use_multi_rank_bucket_allreduce`)
    and gather the new weights; 2 and 3 reduce in every micro-step. Stage 3 gathers weights for
    the forward pass, and again for the backward pass where it released them.
    """
    encoder, decoder = parameter_sizes(recipe)
    sizes = encoder + decoder
    total, trained = sum(sizes), sum(trained_sizes(recipe))
    if strategy.stage < 3:
        passes = (2, 3, 2 * accumulation + 1)[strategy.stage] * trained
    else:
        persistent = sum(size for size in sizes if size <= strategy.persistence_threshold)
        gathered = 2 * total - persistent - kept_gathered(sizes, strategy)
        passes = accumulation * (gathered + trained) + persistent
    return round(BYTES[recipe.train.precision] * passes * (ranks - 1) / ranks)


def exchanged_bytes(recipe: EncoderRecipe, strategy: Strategy, clips: int) -> int:
    """Bytes that a rank sends to its sequence group for this number of clips.

    Each layer exchanges queries, keys, values and output, forward and backward, and forward again
    where it is recomputed; the encoded tokens are gathered, and their gradients scattered.
    """
    group, size = strategy.sequence_parallel, recipe.size
    again = math.ceil(size.depth / strategy.recompute) if strategy.recompute else 0
    exchanges = 4 * (2 * size.depth + again) / group
    values = clips * math.ceil(recipe.counts.encoded / group) * size.width
    return round(BYTES[recipe.train.precision] * values * (exchanges + 2) * (group - 1))


def weigh(recipe: EncoderRecipe, strategy: Strategy, micro_batch: int, machine: Machine) -> Option:
    """The costs of a strategy and a micro-batch, a divisor of the rank's share, on a machine."""
    group, gpus = strategy.sequence_parallel, machine.num_gpus
    clips = recipe.train.total_batch * group // gpus
    accumulation = clips // micro_batch
    strategy = replace(strategy, stage=stage_of_run(strategy.stage, recipe, accumulation))
    memory = footprint(
        recipe, strategy, world_size=gpus, micro_batch=micro_batch, accumulation=accumulation
    )
    passes, cost = forward_passes(recipe), cost_of(recipe)
    # Frozen layers are not recomputed.
    again = min(1, passes - 1) / strategy.recompute if strategy.recompute else 0
    forward = cost.flops_forward_per_clip - encoder_flops(recipe) * (1 - 1 / group)
    flops = clips * forward * (passes + again)
    flops += clips * cost.flops_teacher_per_clip
    sent = sent_bytes(recipe, strategy, gpus, accumulation)
    sent += exchanged_bytes(recipe, strategy, clips)
    return Option(
        strategy=strategy,
        micro_batch=micro_batch,
        accumulation=accumulation,
        footprint=memory,
        sent_bytes=sent,
        compute_s=flops / (machine.tflops * 1e12),
        communication_s=sent / (machine.bandwidth_gb_s * 1e9),
        fits=memory.peak <= machine.usable_bytes,
    )


def micro_batches(recipe: EncoderRecipe, num_gpus: int, sequence_parallel: int = 1) -> list[int]:
    """Micro-batches that divide the rank's share of the batch, largest first.

    Errors: `UserError` where the ranks cannot share the batch.
    """
    recipe = recipe.by_phase()[-1]
    plan = make_plan(recipe, world_size=num_gpus, num_videos=1, sequence_parallel=sequence_parallel)
    share, repeats = recipe.train.total_batch // plan.data_ranks, recipe.data.repeats
    if recipe.transformer.mixes_clips:
        repeats = math.lcm(repeats, 2)
        if share % repeats:
            raise UserError(f"clips are mixed in pairs, and a rank's share of {share} is not even.")
    return [m for m in range(share, 0, -1) if share % m == 0 and m % repeats == 0]


def compare(recipe: EncoderRecipe, base: Strategy, machine: Machine) -> list[Option]:
    """Stages 0 (fp32 only) to 3 without and with recomputation, then the offloads.

    Each has the largest micro-batch that fits, else the smallest one; of phases, for the last.
    """
    every = base.recompute or 1
    plain = replace(base, offload_optimizer=False, offload_parameters=False)
    offloaded = replace(plain, recompute=every, offload_optimizer=True)
    stages = range(0 if recipe.train.precision == "fp32" else 1, 4)
    strategies = [
        *(replace(plain, stage=stage, recompute=k) for k in (0, every) for stage in stages),
        replace(offloaded, stage=2),
        replace(offloaded, stage=3, offload_parameters=True),
    ]
    *earlier, last = recipe.by_phase()
    for phase in earlier:  # an error where the ranks cannot share its batch
        _ = micro_batches(phase, machine.num_gpus, base.sequence_parallel)
    # Where gradients are summed in fp32, stage 1 is stage 2.
    return list(dict.fromkeys(_largest(last, strategy, machine) for strategy in strategies))


def _largest(recipe: EncoderRecipe, strategy: Strategy, machine: Machine) -> Option:
    """With the largest micro-batch that fits, else the smallest one."""
    sizes = micro_batches(recipe, machine.num_gpus, strategy.sequence_parallel)
    options = [weigh(recipe, strategy, micro_batch, machine) for micro_batch in sizes]
    return next((option for option in options if option.fits), options[-1])


def over_phases(
    recipe: EncoderRecipe, plan: RunPlan, option: Option, machine: Machine
) -> list[PhaseOption]:
    """An option of a whole run in each of its phases, with its strategy."""
    *earlier, last = zip(plan.parts, recipe.by_phase(), strict=True)
    options = [PhaseOption(part, r, _largest(r, option.strategy, machine)) for part, r in earlier]
    return [*options, PhaseOption(*last, option)]


def run_seconds(
    recipe: EncoderRecipe, plan: RunPlan, option: Option, machine: Machine
) -> float | None:
    """Time of all steps; None with offloading."""
    seconds = [phase.seconds for phase in over_phases(recipe, plan, option, machine)]
    return None if option.step_s is None else sum(s for s in seconds if s is not None)


def recommend(options: Sequence[Option]) -> Option | None:
    """The simplest option that fits and is at most `WORTH_IT` times slower than the fastest.

    Simple: first without recomputation, then the lower stage, because the cost of many small
    collectives is not predicted. Offloading only where nothing else fits.
    """
    fitting = [option for option in options if option.fits]
    if not fitting:
        return None
    least = min(map(_drawbacks, fitting))
    rivals = [option for option in fitting if _drawbacks(option) == least]
    fastest = min(map(_seconds, rivals))
    close = [option for option in rivals if _seconds(option) <= WORTH_IT * fastest]
    return min(close, key=lambda option: (option.strategy.recompute > 0, option.strategy.stage))


def _drawbacks(option: Option) -> tuple[bool, bool]:
    small = option.micro_batch < SMALL_MICRO_BATCH and option.accumulation > 1
    return option.strategy.offloads, small


def _seconds(option: Option) -> float:
    return option.compute_s + option.communication_s


@dataclass(frozen=True)
class Scale:
    """One row of the scaling table.

    num_streams: the data.num_streams that it needs. refused: why the batch cannot be divided.
    option: None where it cannot, or where nothing fits.
    """

    num_gpus: int
    num_streams: int
    refused: str | None
    option: Option | None


def with_streams(recipe: EncoderRecipe, num_streams: int) -> EncoderRecipe:
    data = recipe.data.model_copy(update={"num_streams": num_streams})
    return recipe.model_copy(update={"data": data})


def scaling(
    recipe: EncoderRecipe, base: Strategy, machine: Machine, counts: Sequence[int]
) -> list[Scale]:
    """The recommendation for each number of GPUs, with the same total batch and schedule."""
    rows = []
    for num_gpus in counts:
        # Streams can be chosen before a run starts; the batch is mathematics.
        data_ranks = max(1, num_gpus // base.sequence_parallel)
        shared = recipe.data.shared_streams
        streams = math.lcm(shared, data_ranks) if shared else recipe.data.num_streams
        try:
            options = compare(
                with_streams(recipe, streams), base, replace(machine, num_gpus=num_gpus)
            )
            rows.append(Scale(num_gpus, streams, None, recommend(options)))
        except UserError as error:
            rows.append(Scale(num_gpus, streams, str(error), None))
    return rows


def possible_gpu_counts(recipe: EncoderRecipe, largest: int, group: int = 1) -> list[int]:
    """Numbers of GPUs up to `largest`, in groups, that divide the batch, and the streams."""
    videos = [phase.train.total_batch // phase.data.repeats for phase in recipe.by_phase()]
    common = math.gcd(recipe.data.shared_streams, *videos)
    return [n * group for n in range(1, largest // group + 1) if common % n == 0]


@dataclass(frozen=True)
class Advice:
    """All that is printed. given: the recipe's own batch (in the phase that takes the most memory)
    with the DeepSpeed JSON `json_name`.

    phases: the recommended option in each, empty for a run without phases. supply: of the data, at
    the recommended option's (highest) rate, if that is predicted.
    """

    name: str
    json_name: str
    recipe: EncoderRecipe
    plan: RunPlan
    machine: Machine
    given: Option
    options: list[Option]
    best: Option | None
    phases: list[PhaseOption]
    supply: Supply | None
    scales: list[Scale]
    possible: list[int]
    assumptions: list[str]


def advise(
    name: str,
    json_name: str,
    recipe: EncoderRecipe,
    plan: RunPlan,
    base: Strategy,
    *,
    num_gpus: int,
    memory_gib: float,
    tflops: float | None,
    tflops_from: str,
    bandwidth_gb_s: float | None,
    stored_bytes: int | None = None,
    layers: int | None = None,
    decode_rate: float | None = None,
    cores_per_gpu: int | None = None,
) -> Advice:
    """Compare ZeRO stages, micro-batches and numbers of GPUs for a recipe.

    base: the DeepSpeed JSON's strategy. memory_gib: of one GPU. tflops: achieved by one GPU in
    matrix products, with its origin for the reader; bandwidth_gb_s: sent by one; decode_rate:
    clips/s of one core; None: assumed. stored_bytes, layers: of the shards, if they exist.
    """
    machine = Machine(
        num_gpus, memory_gib, tflops or ASSUMED_TFLOPS, bandwidth_gb_s or ASSUMED_BANDWIDTH_GB_S
    )
    options = compare(recipe, base, machine)
    best = recommend(options)
    phases = [] if best is None else over_phases(recipe, plan, best, machine)
    needed = None
    if best is not None and best.step_s is not None:
        clips_per_s, loaded = max(
            ((p.part.plan.total_batch / (p.option.step_s or 1), p.recipe) for p in phases),
            key=operator.itemgetter(0),
        )
        needed = supply(
            loaded,
            clips_per_s * plan.sequence_parallel,
            num_videos=plan.num_videos,
            stored_bytes=stored_bytes,
            layers=layers,
            rate_per_core=decode_rate,
            cores=None if cores_per_gpu is None else cores_per_gpu * num_gpus,
        )
    behind = forward_passes(recipe) - 1
    counts = {*(2**power for power in range(LARGEST.bit_length())), num_gpus}
    return Advice(
        name=name,
        json_name=json_name,
        recipe=recipe,
        plan=plan,
        machine=machine,
        given=max(
            (
                weigh(phase, base, part.plan.micro_batch, machine)
                for part, phase in zip(plan.parts, recipe.by_phase(), strict=True)
            ),
            key=lambda option: option.footprint.peak,
        ),
        options=options,
        best=best,
        phases=phases if plan.phases else [],
        supply=needed,
        scales=scaling(recipe, base, machine, sorted(counts)),
        possible=possible_gpu_counts(recipe, LARGEST, plan.sequence_parallel),
        assumptions=[
            f"{machine.tflops:g} TFLOP/s achieved in matrix products per GPU"
            f"{tflops_from}; a backward pass costs {_COUNTS.get(behind, f'{behind:.2f}')} "
            "forward passes, recomputing one more",
            f"every GPU sends {machine.bandwidth_gb_s:g} GB/s"
            f"{'' if bandwidth_gb_s else ' (assumed; give --bandwidth_gb_s)'}, to GPUs of its own "
            "host as to others; ring collectives; nothing overlaps computation",
            f"{USABLE_SHARE:.0%} of the GPU's memory is available to the run; the rest is CUDA, "
            "libraries and fragmentation",
            "data arrives in time, no rank is late; launches, ZeRO-3's many small gathers and "
            "small micro-batches cost nothing more",
            "fused attention; all layers share one mask of the run's precision",
        ],
    )
