"""What the adviser prints: tables and notes for people, or one JSON document."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from arvideo_ds.config import EncoderRecipe
from arvideo_ds.planning.advice import (
    GIB,
    USABLE_SHARE,
    Machine,
    Option,
    Scale,
    compare,
    possible_gpu_counts,
    recommend,
    scaling,
    weigh,
)
from arvideo_ds.planning.memory import Strategy
from arvideo_ds.planning.plan import RunPlan

LARGEST = 1024
ASSUMED_TFLOPS, ASSUMED_BANDWIDTH_GB_S = 100.0, 20.0
ASSUMPTIONS = (
    "{tflops:g} TFLOP/s achieved in matrix products per GPU{tflops_from}; a backward pass costs "
    "two forward passes, recomputing one more",
    "every GPU sends {bandwidth:g} GB/s{bandwidth_from}, to its own host's GPUs as to others; "
    "ring collectives; nothing overlaps computation",
    "{share:.0%} of the GPU's memory is the run's; the rest is CUDA, libraries and fragmentation",
    "data arrives in time, no rank is late; launches, ZeRO-3's many small gathers and small "
    "micro-batches cost nothing more",
    "fused attention; the mask becomes a matrix of the run's precision for each layer",
)


@dataclasses.dataclass(frozen=True)
class Advice:
    """All that is printed. name, json_name: what the recipe and the DeepSpeed JSON are called."""

    name: str
    json_name: str
    recipe: EncoderRecipe
    plan: RunPlan
    machine: Machine
    given: Option
    options: list[Option]
    best: Option | None
    scales: list[Scale]
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
    bandwidth_gb_s: float | None,
) -> Advice:
    """Weigh ZeRO stages, micro-batches and numbers of GPUs for a recipe.

    base: what the DeepSpeed JSON says. memory_gib: of one GPU. tflops: achieved by one GPU in
    matrix products; bandwidth_gb_s: sent by one; None: assumed.
    """
    machine = Machine(
        num_gpus, memory_gib, tflops or ASSUMED_TFLOPS, bandwidth_gb_s or ASSUMED_BANDWIDTH_GB_S
    )
    compared = compare(recipe, base, machine)
    counts = [2**power for power in range(LARGEST.bit_length())]
    return Advice(
        name=name,
        json_name=json_name,
        recipe=recipe,
        plan=plan,
        machine=machine,
        given=weigh(recipe, base, plan.micro_batch, machine),
        options=compared,
        best=recommend(compared),
        scales=scaling(recipe, base, machine, sorted({*counts, num_gpus})),
        assumptions=[
            line.format(
                tflops=machine.tflops,
                tflops_from="" if tflops else " (assumed; give --tflops)",
                bandwidth=machine.bandwidth_gb_s,
                bandwidth_from="" if bandwidth_gb_s else " (assumed; give --bandwidth_gb_s)",
                share=USABLE_SHARE,
            )
            for line in ASSUMPTIONS
        ],
    )


def as_document(advice: Advice) -> dict[str, Any]:
    return {
        "recipe": advice.name,
        "deepspeed_config": advice.json_name,
        "machine": dataclasses.asdict(advice.machine),
        "plan": advice.plan.as_dict(),
        "given": _record(advice.given, advice),
        "options": [_record(option, advice) for option in advice.options],
        "recommended": None if advice.best is None else _record(advice.best, advice),
        "notes": notes(advice),
        "scaling": [
            {
                "num_gpus": scale.num_gpus,
                "num_streams": scale.num_streams,
                "refused": scale.refused,
                "option": None if scale.option is None else _record(scale.option, advice),
            }
            for scale in advice.scales
        ],
        "possible_gpu_counts": _possible(advice),
        "assumptions": advice.assumptions,
    }


def _possible(advice: Advice) -> list[int]:
    return possible_gpu_counts(advice.recipe, LARGEST, advice.plan.sequence_parallel)


def _record(option: Option, advice: Advice) -> dict[str, Any]:
    rate = clips_per_s(option, advice)
    return {
        **dataclasses.asdict(option),
        "name": label(option.strategy),
        "peak_bytes": option.footprint.peak,
        "step_s": option.step_s,
        "clips_per_s": rate,
        "train_s": None if option.step_s is None else option.step_s * advice.plan.steps,
    }


def clips_per_s(option: Option, advice: Advice) -> float | None:
    return None if option.step_s is None else advice.plan.total_batch / option.step_s


def label(strategy: Strategy) -> str:
    offloads = {
        (True, False): " + offload optimizer",
        (True, True): " + offload all",
        (False, True): " + offload weights",
    }
    recompute = {0: "", 1: " + recompute"}.get(
        strategy.recompute, f" + recompute every {strategy.recompute}th"
    )
    key = (strategy.offload_optimizer, strategy.offload_parameters)
    shared = (
        f" + {strategy.sequence_parallel} share tokens" if strategy.sequence_parallel > 1 else ""
    )
    return f"ZeRO-{strategy.stage}{recompute}{offloads.get(key, '')}{shared}"


def notes(advice: Advice) -> list[str]:
    """The recommendation in words, and what to beware of."""
    best, given = advice.best, advice.given
    if best is None:
        least = min(advice.options, key=lambda option: option.footprint.peak)
        return [
            f"nothing fits: {label(least.strategy)} with a micro-batch of {least.micro_batch} "
            f"takes {gib(least.footprint.peak)} GiB of {advice.machine.usable_bytes / GIB:.1f} "
            "usable. Use more GPUs, GPUs with more memory, or a smaller model."
        ]
    said = [
        f"{advice.json_name} with the recipe's batch, {given.micro_batch} x {given.accumulation}: "
        f"{gib(given.footprint.peak)} GiB of {advice.machine.usable_bytes / GIB:.1f} usable, "
        + ("fits" if given.fits else "does not fit"),
        f"recommended: {label(best.strategy)}, train.micro_batch={best.micro_batch}"
        f" ({best.accumulation} accumulated): {_how(best.strategy)}",
    ]
    if given.strategy.stage >= 2 and best.strategy.stage == 0 and best.sent_bytes:
        more = given.sent_bytes / best.sent_bytes
        said.append(
            f"the model fits under plain data parallel: {advice.json_name} sends {more:.1f} times "
            "as much a step and is slower."
        )
    if best.strategy.offloads:
        said.append("offloading is slow, and how slow the host decides: no time is predicted.")
    return said


def _how(strategy: Strategy) -> str:
    """The JSON that says it, and what to add where none of ours does."""
    size = strategy.sequence_parallel
    return _how_alone(strategy) + (f', with "sequence_parallel_size": {size}' if size > 1 else "")


def _how_alone(strategy: Strategy) -> str:
    ready = {
        (2, 1, False): "zero2_checkpointing.json",
        **{(stage, 0, False): f"zero{stage}.json" for stage in range(4)},
    }
    found = ready.get((strategy.stage, strategy.recompute, strategy.offloads))
    if found is not None:
        return f"ds_configs/{found}"
    if strategy.offload_parameters:
        return 'ds_configs/zero3_offload.json with "activation_checkpointing": {}'
    recompute = f'ds_configs/zero{strategy.stage}.json with "activation_checkpointing": {{}}'
    if strategy.offload_optimizer:
        return (
            f'{recompute}, "zero_force_ds_cpu_optimizer": false and, in zero_optimization, '
            '"offload_optimizer": {"device": "cpu", "pin_memory": true}'
        )
    return recompute


def gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size < 10 * GIB else f"{size / GIB:.1f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their longest cell; first and last to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = []
    for row in [head, *rows]:
        cells = [
            cell.rjust(width) if 0 < i < len(head) - 1 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def options_table(advice: Advice) -> str:
    head = (
        "GiB per GPU", "batch", "weights", "gradients", "optimizer", "activations", "peak",
        "host", "sent GB", "step s", "fits",
    )  # fmt: skip
    rows = []
    for option in advice.options:
        states, kept = option.footprint.states, option.footprint.activations
        rows.append(
            (
                ("* " if option == advice.best else "  ") + label(option.strategy),
                f"{option.micro_batch} x {option.accumulation}",
                gib(states.parameters),
                gib(states.gradients),
                gib(states.optimizer),
                gib(kept.saved + kept.workspace),
                gib(option.footprint.peak),
                gib(states.host) if states.host else "-",
                f"{option.sent_bytes / 1e9:.1f}",
                "?" if option.step_s is None else f"{option.step_s:.3g}",
                "yes" if option.fits else "no",
            )
        )
    return table(head, rows)


def scaling_table(advice: Advice) -> str:
    head = ("GPUs", "batch", "peak GiB", "step s", "clips/s", "sending", "time to train", "how")
    rows = []
    for scale in advice.scales:
        option = scale.option
        if option is None:
            why = "the batch cannot be shared evenly" if scale.refused else "does not fit"
            rows.append((str(scale.num_gpus), *6 * ("-",), why))
            continue
        step_s, rate = option.step_s, clips_per_s(option, advice)
        rows.append(
            (
                str(scale.num_gpus),
                f"{option.micro_batch} x {option.accumulation}",
                gib(option.footprint.peak),
                "?" if step_s is None else f"{step_s:.3g}",
                "?" if rate is None else f"{rate:.0f}",
                "?" if step_s is None else f"{option.communication_s / step_s:.0%}",
                "?" if step_s is None else duration(step_s * advice.plan.steps),
                label(option.strategy) + _streams(scale, advice),
            )
        )
    return table(head, rows)


def _streams(scale: Scale, advice: Advice) -> str:
    changed = scale.num_streams != advice.recipe.data.num_streams
    return f", data.num_streams={scale.num_streams}" if changed else ""


def duration(seconds: float) -> str:
    return (
        f"{seconds / 86400:.1f} days" if seconds > 86400 else str(timedelta(seconds=round(seconds)))
    )


def print_advice(advice: Advice) -> None:
    plan, machine, recipe = advice.plan, advice.machine, advice.recipe
    parameters = (plan.parameters_encoder + plan.parameters_decoder) / 1e6
    print(
        f"{advice.name}: ViT-{recipe.model.size}, {parameters:.0f} M parameters, "
        f"{recipe.train.precision}, {plan.gflops_forward_per_clip:.0f} GFLOP forward per clip\n"
        f"{machine.num_gpus} GPU(s) of {machine.memory_gib:g} GiB, {plan.total_batch} clips a "
        f"step, {plan.steps} steps\n"
    )
    print(options_table(advice))
    print("batch: micro-batch x accumulated. peak: most of a step, communication buffers included.")
    print()
    for note in notes(advice):
        print(note)
    print(f"\nThe same run on 1 to {LARGEST} GPUs:")
    print(scaling_table(advice))
    counts = ", ".join(map(str, _possible(advice)))
    print(
        f"numbers of GPUs that divide train.total_batch={plan.total_batch} and "
        f"data.num_streams={recipe.data.num_streams}: {counts}. data.num_streams is free to choose "
        "before a run starts, and fixed afterwards."
    )
    print("\nassumed:")
    for line in advice.assumptions:
        print(f"- {line}")
