"""A DeepSpeed JSON + the run plan -> the configuration for DeepSpeed; one owner per setting.

The recipe owns what changes the mathematics (batch, precision, clipping, optimiser, schedule), the
JSON what changes memory and speed. A key of both is "auto" in our files; an equal value passes,
another one is an error that names both places and both values. Needs neither torch nor DeepSpeed.
"""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from arvideo_ds.arguments import deepspeed_configs
from arvideo_ds.config import Recipe
from arvideo_ds.errors import UserError
from arvideo_ds.planning.memory import stage_of_run
from arvideo_ds.planning.plan import RunPlan

AUTO = "auto"
ACTIVATION_CHECKPOINTING = "activation_checkpointing"
# Our own key in that section: every k-th transformer layer is recomputed.
EVERY = "every"
SEQUENCE_PARALLEL = "sequence_parallel_size"
_CHECKPOINTING_KEYS = frozenset(
    """every partition_activations cpu_checkpointing contiguous_memory_optimization
    number_checkpoints synchronize_checkpoint_boundary profile""".split()
)
# DeepSpeed ignores unknown top-level keys silently.
_KNOWN_KEYS = frozenset(
    """train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps
    gradient_clipping bf16 fp16 zero_optimization activation_checkpointing aio
    communication_data_type prescale_gradients gradient_predivide_factor sparse_gradients
    steps_per_print wall_clock_breakdown dump_state flops_profiler comms_logger memory_breakdown
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer checkpoint data_types tensorboard
    csv_monitor wandb compile timers seq_parallel_communication_data_type disable_allgather
    sequence_parallel_size""".split()
)
_RECIPE_SECTIONS = {
    "optimizer": "optim.*",
    "scheduler": "optim.*",
    "amp": "train.precision",
    # It would also compute in half precision what models compute in float32.
    "torch_autocast": "train.precision",
}


def read_deepspeed_json(path: Path) -> dict[str, Any]:
    """The file as a dict. Errors: `UserError` when it is missing or not one JSON object."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read --deepspeed_config {path}: {error}. Expected a JSON file, or one of "
            f"ds_configs/ by name: {', '.join(deepspeed_configs())}."
        ) from None
    if not isinstance(tree, dict):
        raise UserError(f"--deepspeed_config {path} must contain one JSON object.")
    return tree


def sequence_parallel(tree: dict[str, Any], origin: str) -> int:
    """Ranks that share the tokens of their clips; 1: no sharing. Errors: `UserError`."""
    return _require_count(tree.get(SEQUENCE_PARALLEL, 1), SEQUENCE_PARALLEL, origin)


def resolve(tree: dict[str, Any], recipe: Recipe, plan: RunPlan, origin: str) -> dict[str, Any]:
    """Fill every "auto" of a JSON, for `deepspeed.initialize`. origin: its name in errors.

    Errors: `UserError` for contradictions, unknown keys and combinations that are known to fail.
    """
    _check_keys(tree, origin)
    resolved = copy.deepcopy(tree)
    for dotted, (value, owner) in _owned(recipe, plan).items():
        _fill(resolved, dotted, value, owner, origin)
    _check_combinations(resolved, recipe, origin)
    stage = stage_of_run(zero_stage(resolved), recipe, _accumulation(plan))
    resolved.setdefault("zero_optimization", {})["stage"] = stage
    for dotted in _autos(resolved):
        raise UserError(
            f'{origin}: "{dotted}" is "auto", but no recipe setting decides it. Give a value.'
        )
    # The training loop logs; DeepSpeed's timer would wait for the device twice in every step.
    resolved.setdefault("steps_per_print", 2**31)
    resolved.setdefault("timers", {"throughput": {"enabled": False}})
    return resolved


def _accumulation(plan: RunPlan) -> int:
    """The most micro-batches of a step."""
    return max(part.plan.accumulation for part in plan.parts)


def zero_stage(resolved: dict[str, Any]) -> int:
    return int(resolved.get("zero_optimization", {}).get("stage", 0))


def compiles(recipe: Recipe, resolved: dict[str, Any], *, able: bool) -> bool:
    """Whether the run compiles its model. able: `build.can_compile`, for train.compile=auto."""
    if isinstance(recipe.train.compile, bool):
        return recipe.train.compile
    return able and not any(_against_compiling(resolved).values())


def _owned(recipe: Recipe, plan: RunPlan) -> dict[str, tuple[Any, str]]:
    """Key of the DeepSpeed JSON -> the run's value and the recipe's setting behind it."""
    precision, accumulation = recipe.train.precision, _accumulation(plan)
    plan = plan.parts[0].plan  # the engine gets another batch when a phase has one
    batch_on_ranks = f"train.total_batch on {plan.world_size} rank(s)"
    return {
        # In DeepSpeed also micro-batch x accumulation x ranks / sequence_parallel_size.
        "train_batch_size": (plan.total_batch, "train.total_batch"),
        "train_micro_batch_size_per_gpu": (plan.micro_batch, "train.micro_batch"),
        "gradient_accumulation_steps": (plan.accumulation, batch_on_ranks),
        "gradient_clipping": (recipe.optim.clip, "optim.clip"),
        "data_types.grad_accum_dtype": (
            recipe.train.gradients_in(accumulation),
            f"train.grad_dtype={recipe.train.grad_dtype}, {accumulation} accumulated",
        ),
        "bf16.enabled": (precision == "bf16", f"train.precision={precision}"),
        "fp16.enabled": (precision == "fp16", f"train.precision={precision}"),
    }


def _fill(tree: dict[str, Any], dotted: str, value: Any, owner: str, origin: str) -> None:
    *path, key = dotted.split(".")
    node = tree
    for part in path:
        node = node.setdefault(part, {})
    given = node.get(key, AUTO)
    if given not in (AUTO, value):
        raise UserError(
            f"{origin} has {dotted}={json.dumps(given)}, the recipe sets it to "
            f'{json.dumps(value)} ({owner}). Write "auto" in the JSON, or change the recipe.'
        )
    node[key] = value


def _check_keys(tree: dict[str, Any], origin: str) -> None:
    for key in tree:
        if key in _RECIPE_SECTIONS:
            raise UserError(
                f'{origin}: "{key}" belongs to the recipe ({_RECIPE_SECTIONS[key]}), so that one '
                "recipe gives one curve with any JSON. Remove the section."
            )
    _require_known(tree, _KNOWN_KEYS, "", origin)
    for key in ("zero_optimization", "bf16", "fp16", "data_types", ACTIVATION_CHECKPOINTING):
        if not isinstance(tree.get(key, {}), dict):
            raise UserError(f'{origin}: "{key}" must be an object.')
    section = tree.get(ACTIVATION_CHECKPOINTING, {})
    _require_known(section, _CHECKPOINTING_KEYS, f"{ACTIVATION_CHECKPOINTING}.", origin)
    _require_count(section.get(EVERY, 1), f"{ACTIVATION_CHECKPOINTING}.{EVERY}", origin)


def _require_known(keys: Collection[str], known: Collection[str], prefix: str, origin: str) -> None:
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f'; did you mean "{near[0]}"?' if near else ""
            raise UserError(f'{origin}: unknown key "{prefix}{key}"{hint}')


def _require_count(value: Any, key: str, origin: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{origin}: {key}={json.dumps(value)}; expected 1 or more.")
    return value


def _check_combinations(resolved: dict[str, Any], recipe: Recipe, origin: str) -> None:
    """Refuse what is known to train wrongly or to fail, with the reason."""
    zero = resolved.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise UserError(f"{origin}: zero_optimization.stage={stage!r}; expected 0, 1, 2 or 3.")
    checkpointing = resolved.get(ACTIVATION_CHECKPOINTING, {})
    offloads = [zero.get(key) or {} for key in ("offload_optimizer", "offload_param")]
    on_nvme = any(offload.get("device") == "nvme" for offload in offloads)
    own_adam = recipe.optim.implementation == "deepspeed"
    applies_any_gradient = stage == 0 and recipe.train.precision == "fp32"
    reasons = {
        "offload_optimizer needs zero_optimization.stage 2 or 3.": offloads[0] and stage < 2,
        "offload_param needs zero_optimization.stage 3.": offloads[1] and stage < 3,
        'an offload to device "nvme": checkpoints here do not read from it. Use "cpu".': on_nvme,
        "activation_checkpointing.partition_activations=true needs model parallelism, and empties "
        "tensors that decoder layers share. Remove it.": checkpointing.get("partition_activations"),
        "activation_checkpointing.cpu_checkpointing=true empties tensors that decoder layers "
        "share, and no parity test on a GPU has passed. Remove it; recomputing every layer takes "
        "the least memory.": checkpointing.get("cpu_checkpointing"),
        "zero_hpz_partition_size above 1 has given wrong gradients (DeepSpeed issue 4851). Remove "
        "it.": zero.get("zero_hpz_partition_size", 1) > 1,
        "bf16.check_grad_overflow=false would apply gradients that are not finite. Remove it.": (
            not resolved["bf16"].get("check_grad_overflow", True)
        ),
        '"compile" is DeepCompile, which is not supported; train.compile of the recipe compiles '
        "the model.": "compile" in resolved,
        **(_against_compiling(resolved) if recipe.train.compile is True else {}),
        "optim.implementation=deepspeed at stage 0 in fp32 would apply gradients that are not "
        "finite. Use torch, or a stage above.": own_adam and applies_any_gradient,
    }
    for reason, applies in reasons.items():
        if applies:
            raise UserError(f"{origin}: {reason}")


def _against_compiling(resolved: dict[str, Any]) -> dict[str, bool]:
    """Why a run with this configuration may not compile its model -> whether that applies."""
    return {
        f"{SEQUENCE_PARALLEL} above 1 with train.compile=true may lose gradients: DeepSpeed warns "
        "of compiling such exchanges (sequence/layer.py). Set train.compile=false.": (
            resolved.get(SEQUENCE_PARALLEL, 1) > 1
        ),
        "train.compile=true does not work at stage 3, whose hooks break every graph (DeepSpeed "
        "issue 6719). Use a stage below, or train.compile=false.": zero_stage(resolved) == 3,
        "overlap_comm=true with train.compile=true has lost gradients (DeepSpeed issue 8061). Set "
        "one of them to false.": bool(resolved.get("zero_optimization", {}).get("overlap_comm")),
    }


def _autos(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _autos(value, f"{prefix}{key}.")
        elif value == AUTO:
            yield prefix + key
