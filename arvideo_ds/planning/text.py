"""What the adviser prints: tables and notes, or one JSON document."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from arvideo_ds.planning.advice import (
    GIB,
    LARGEST,
    Advice,
    Option,
    Scale,
    run_seconds,
    with_streams,
)
from arvideo_ds.planning.data import Supply
from arvideo_ds.planning.memory import Strategy
from arvideo_ds.planning.plan import phase_lines, schedule_words, source_lines


def as_document(advice: Advice) -> dict[str, Any]:
    return {
        "recipe": advice.name,
        "deepspeed_config": advice.json_name,
        "machine": dataclasses.asdict(advice.machine),
        "plan": advice.plan.as_dict(),
        "given": _record(advice.given, advice),
        "options": [_record(option, advice) for option in advice.options],
        "recommended": _record(advice.best, advice),
        "data": None if advice.supply is None else _supply_record(advice.supply),
        "notes": _notes(advice),
        "scaling": [
            {**vars(scale), "option": _record(scale.option, advice, scale)}
            for scale in advice.scales
        ],
        **({"phases": _phase_records(advice)} if advice.phases else {}),
        "possible_gpu_counts": advice.possible,
        "assumptions": advice.assumptions,
    }


def _record(
    option: Option | None, advice: Advice, scale: Scale | None = None
) -> dict[str, Any] | None:
    if option is None:
        return None
    step_s = option.step_s
    return {
        **dataclasses.asdict(option),
        "name": _label(option.strategy),
        "peak_bytes": option.footprint.peak,
        "step_s": step_s,
        "clips_per_s": None if step_s is None else advice.plan.total_batch / step_s,
        "train_s": _train_s(option, advice, scale),
    }


def _train_s(option: Option, advice: Advice, scale: Scale | None = None) -> float | None:
    recipe, machine = advice.recipe, advice.machine
    if scale is not None:
        recipe = with_streams(recipe, scale.num_streams)
        machine = dataclasses.replace(machine, num_gpus=scale.num_gpus)
    return run_seconds(recipe, advice.plan, option, machine)


def _plain_s(advice: Advice) -> float | None:
    """Seconds of the run with as many videos, all in clips of the last phase."""
    plan, best = advice.plan, advice.best
    if best is None or best.step_s is None:
        return None
    return best.step_s * plan.videos_before(plan.steps) / plan.videos_per_step


def _phase_records(advice: Advice) -> dict[str, Any]:
    return {
        "options": [
            {**phase.part.as_dict(), "option": _record(phase.option, advice), "s": phase.seconds}
            for phase in advice.phases
        ],
        "train_s": advice.best and _train_s(advice.best, advice),
        "train_s_without": _plain_s(advice),
    }


def _phase_words(advice: Advice) -> list[str]:
    """The recommended option in each phase, and what phases save; nothing without phases."""
    if not advice.phases:
        return []
    lines = []
    for line, phase in zip(phase_lines(advice.plan), advice.phases, strict=True):
        option = phase.option
        times = "" if phase.seconds is None else f", {_duration(phase.seconds)}"
        lines.append(
            f"{line}; recommended {option.micro_batch} x {option.accumulation}, "
            f"{_gib(option.footprint.peak)} GiB{times}" + ("" if option.fits else ": does not fit")
        )
    plain_s = _plain_s(advice)
    if advice.best is not None and plain_s is not None:
        train_s = sum(phase.seconds or 0.0 for phase in advice.phases)
        lines.append(
            f"with phases {_duration(train_s)} to train; as many videos in the last phase's clips "
            f"{_duration(plain_s)}: {train_s / plain_s:.0%}."
        )
    return lines


def _supply_record(supply: Supply) -> dict[str, Any]:
    return {**dataclasses.asdict(supply), "decode_cores": supply.decode_cores}


def _supply_words(supply: Supply) -> list[str]:
    """What the data must deliver, and a warning where it cannot."""
    words = (
        f"{supply.clips_per_s:.0f} clips/s: {supply.decode_cores:.1f} cores that decode "
        f"{supply.rate_per_core:.3g} clips/s each"
    )
    if supply.read_bytes_per_s is not None and supply.stored_bytes is not None:
        words += (
            f"; {supply.read_bytes_per_s / 1e6:.0f} MB/s of the shards' "
            f"{supply.stored_bytes / 1e9:.1f} GB"
        )
    lines = [f"data for the recommended option: {words}"]
    if not supply.suffices and supply.cores is not None:
        lines.append(
            f"warning: {supply.cores} cores decode {supply.cores * supply.rate_per_core:.0f} "
            "clips/s, so that the GPUs will wait for data. Use more cores, a higher data.repeats, "
            "or shards of smaller videos."
        )
    return lines


def _label(strategy: Strategy) -> str:
    parts = [f"ZeRO-{strategy.stage}"]
    if strategy.recompute:
        every = f" one layer in {strategy.recompute}" if strategy.recompute > 1 else ""
        parts.append(f"recompute{every}")
    if strategy.offload_optimizer:
        parts.append(f"offload {'all' if strategy.offload_parameters else 'optimizer'}")
    elif strategy.offload_parameters:
        parts.append("offload weights")
    if strategy.sequence_parallel > 1:
        parts.append(f"{strategy.sequence_parallel} share tokens")
    return " + ".join(parts)


def _notes(advice: Advice) -> list[str]:
    """The recommendation in words, and warnings."""
    best, given = advice.best, advice.given
    usable = f"{advice.machine.usable_bytes / GIB:.1f}"
    if best is None:
        least = min(advice.options, key=lambda option: option.footprint.peak)
        return [
            f"nothing fits: {_label(least.strategy)} with a micro-batch of {least.micro_batch} "
            f"takes {_gib(least.footprint.peak)} GiB of {usable} usable. Use more GPUs, GPUs with "
            "more memory, or a smaller model."
        ]
    lines = [
        f"{advice.json_name} with the recipe's batch, {given.micro_batch} x {given.accumulation}: "
        f"{_gib(given.footprint.peak)} GiB of {usable} usable, "
        + ("fits" if given.fits else "does not fit"),
        f"recommended: {_label(best.strategy)}, train.micro_batch={best.micro_batch}"
        f" ({best.accumulation} accumulated): {_how(best.strategy)}",
    ]
    if given.strategy.stage >= 2 > best.strategy.stage and best.sent_bytes:
        lines.append(
            f"the model fits without partitioned gradients: {advice.json_name} sends "
            f"{given.sent_bytes / best.sent_bytes:.1f} times as much per step and is slower."
        )
    if advice.supply is not None:
        lines += _supply_words(advice.supply)
    if best.strategy.offloads:
        lines.append("offloading is slow; its time depends on the host and is not predicted.")
    return lines


def _how(strategy: Strategy) -> str:
    """The JSON in ds_configs/ that configures it, and what to add to it."""
    recompute = 'with "activation_checkpointing": {}'
    if strategy.offload_parameters:
        how = f"zero3_offload.json {recompute}"
    elif strategy.offload_optimizer:
        how = (
            f'zero{strategy.stage}.json {recompute}, "zero_force_ds_cpu_optimizer": false and, in '
            'zero_optimization, "offload_optimizer": {"device": "cpu", "pin_memory": true}'
        )
    elif (strategy.stage, strategy.recompute) == (2, 1):
        how = "zero2_checkpointing.json"
    else:
        how = f"zero{strategy.stage}.json" + (f" {recompute}" if strategy.recompute else "")
    size = strategy.sequence_parallel
    return f"ds_configs/{how}" + (f', with "sequence_parallel_size": {size}' if size > 1 else "")


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size < 10 * GIB else f"{size / GIB:.1f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their longest cell; first and last to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for first, *numbers, last in [head, *rows]:
        cells = [cell.rjust(width) for cell, width in zip(numbers, widths[1:-1], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells, last]))
    return "\n".join(lines)


def _options_table(advice: Advice) -> str:
    head = (
        "GiB per GPU", "batch", "weights", "gradients", "optimizer", "activations", "peak",
        "host", "sent GB", "step s", "fits",
    )  # fmt: skip
    rows = []
    for option in advice.options:
        states, kept = option.footprint.states, option.footprint.activations
        sizes = [states.parameters, states.gradients, states.optimizer]
        sizes += [kept.peak, option.footprint.peak]
        row = (
            ("* " if option == advice.best else "  ") + _label(option.strategy),
            f"{option.micro_batch} x {option.accumulation}",
            *map(_gib, sizes),
            _gib(states.host) if states.host else "-",
            f"{option.sent_bytes / 1e9:.1f}",
            "?" if option.step_s is None else f"{option.step_s:.3g}",
            "yes" if option.fits else "no",
        )
        rows.append(row)
    return _table(head, rows)


def _scaling_table(advice: Advice) -> str:
    head = ("GPUs", "batch", "peak GiB", "step s", "clips/s", "sending", "time to train", "how")
    return _table(head, [_scaling_row(scale, advice) for scale in advice.scales])


def _scaling_row(scale: Scale, advice: Advice) -> tuple[str, ...]:
    option, plan = scale.option, advice.plan
    if option is None:
        why = "the batch cannot be divided evenly" if scale.refused else "does not fit"
        return (str(scale.num_gpus), *6 * ("-",), why)
    times, step_s = 4 * ["?"], option.step_s
    if step_s is not None:
        times = [f"{step_s:.3g}", f"{plan.total_batch / step_s:.0f}"]
        train_s = _train_s(option, advice, scale) or 0.0
        times += [f"{option.communication_s / step_s:.0%}", _duration(train_s)]
    changed = scale.num_streams != advice.recipe.data.num_streams
    return (
        str(scale.num_gpus),
        f"{option.micro_batch} x {option.accumulation}",
        _gib(option.footprint.peak),
        *times,
        _label(option.strategy) + (f", data.num_streams={scale.num_streams}" if changed else ""),
    )


def _duration(seconds: float) -> str:
    days = seconds / 86400
    return f"{days:.1f} days" if days > 1 else str(timedelta(seconds=round(seconds)))


def print_advice(advice: Advice) -> None:
    plan, machine, recipe = advice.plan, advice.machine, advice.recipe
    parameters = f"{(plan.parameters_encoder + plan.parameters_decoder) / 1e6:.0f} M parameters"
    if plan.parameters_trained is not None:
        parameters += f" ({plan.parameters_trained / 1e6:.2f} M trained)"
    teacher = plan.gflops_teacher_per_clip
    shared = recipe.data.shared_streams
    streams = f" and data.num_streams={shared}" if shared else ""
    lines = [
        f"{advice.name}: ViT-{recipe.model.size}, {parameters}, "
        f"{recipe.train.precision}, {plan.gflops_forward_per_clip:.0f} GFLOP forward per clip"
        + (f" + {teacher:.0f} of the teacher" if teacher else ""),
        f"{machine.num_gpus} GPU(s) of {machine.memory_gib:g} GiB, {plan.total_batch} clips per "
        f"step, {plan.steps} steps",
        schedule_words(plan),
        *source_lines(plan),
        "",
        _options_table(advice),
        "batch: micro-batch x accumulated. peak: of a step, communication buffers included.",
        "",
        *_notes(advice),
        *_phase_words(advice),
        f"\nThe same run on 1 to {LARGEST} GPUs:",
        _scaling_table(advice),
        f"numbers of GPUs that divide train.total_batch={plan.total_batch}{streams}: "
        f"{', '.join(map(str, advice.possible))}. data.num_streams can be chosen before a run "
        "starts, and is fixed afterwards.",
        "\nassumed:",
        *(f"- {line}" for line in advice.assumptions),
    ]
    print("\n".join(lines))
