"""DeepSpeed JSON + plan: every "auto" filled, every contradiction refused with both sides."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arvideo_ds.config import PretrainRecipe, load_recipe
from arvideo_ds.engine.resolve import (
    SEQUENCE_PARALLEL,
    compiles,
    read_deepspeed_json,
    resolve,
    sequence_parallel,
    zero_stage,
)
from arvideo_ds.errors import UserError
from arvideo_ds.planning.plan import make_plan

Resolve = Callable[[dict[str, Any]], dict[str, Any]]
ORIGIN = "my.json"
AUTO: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
    "data_types": {"grad_accum_dtype": "auto"},
    "zero_optimization": {"stage": 2},
}
# What the recipe below decides, on two ranks.
DECIDED: dict[str, Any] = {
    "train_batch_size": 48,
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": 3,
    "gradient_clipping": 0.5,
    "bf16": {"enabled": True},
    "fp16": {"enabled": False},
    "data_types": {"grad_accum_dtype": "fp32"},
}


@pytest.fixture
def solve(tiny: Callable[..., PretrainRecipe]) -> Resolve:
    recipe = tiny(
        train={"total_batch": 48, "micro_batch": 8, "precision": "bf16"}, optim={"clip": 0.5}
    )
    plan = make_plan(recipe, world_size=2)
    return lambda tree: resolve(tree, recipe, plan, ORIGIN)


def error_of(solve: Resolve, tree: dict[str, Any]) -> str:
    with pytest.raises(UserError) as raised:
        solve(tree)
    message = str(raised.value)
    assert ORIGIN in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "tree", [AUTO, {}, DECIDED, {**DECIDED, "gradient_clipping": "auto"}], ids=str
)
def test_auto_absent_and_equal_values_all_resolve_to_the_plan(
    tree: dict[str, Any], solve: Resolve
) -> None:
    before = copy.deepcopy(tree)
    resolved = solve(tree)
    assert {key: resolved[key] for key in DECIDED} == DECIDED
    assert tree == before
    json.dumps(resolved)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_one_precision_is_on_and_the_others_off(
    precision: str, tiny: Callable[..., PretrainRecipe]
) -> None:
    recipe = tiny(train={"precision": precision})
    resolved = resolve(AUTO, recipe, make_plan(recipe, world_size=1), ORIGIN)
    enabled = {name for name in ("bf16", "fp16") if resolved[name]["enabled"]}
    assert enabled == {precision} - {"fp32"}


@pytest.mark.parametrize(
    ("key", "given", "decided", "owner"),
    [
        ("train_batch_size", 64, "48", "train.total_batch"),
        ("train_micro_batch_size_per_gpu", 4, "8", "train.micro_batch"),
        ("gradient_accumulation_steps", 1, "3", "train.total_batch"),
        ("gradient_clipping", 1.0, "0.5", "optim.clip"),
        ("bf16", {"enabled": False}, "true", "train.precision=bf16"),
        ("fp16", {"enabled": True}, "false", "train.precision=bf16"),
        ("data_types", {"grad_accum_dtype": "bf16"}, '"fp32"', "train.grad_dtype=auto"),
    ],
)
def test_a_contradiction_names_both_places_and_both_values(
    key: str, given: Any, decided: str, owner: str, solve: Resolve
) -> None:
    message = error_of(solve, {**AUTO, key: given})
    value = next(iter(given.values())) if isinstance(given, dict) else given
    assert key in message
    assert json.dumps(value) in message
    assert decided in message
    assert owner in message


@pytest.mark.parametrize(
    ("train", "accumulation", "summed", "stages"),
    [
        ({"precision": "bf16"}, 1, "bf16", [1, 1, 2, 3]),
        ({"precision": "fp16"}, 1, "fp16", [1, 1, 2, 3]),
        ({"precision": "bf16"}, 2, "fp32", [2, 2, 2, 3]),
        ({"precision": "bf16", "grad_dtype": "fp32"}, 1, "fp32", [2, 2, 2, 3]),
        ({"precision": "bf16", "grad_dtype": "bf16"}, 2, "bf16", [1, 1, 2, 3]),
        ({"precision": "fp32"}, 2, "fp32", [0, 1, 2, 3]),
    ],
)
def test_gradients_are_summed_in_fp32_where_there_are_several(
    train: dict[str, Any],
    accumulation: int,
    summed: str,
    stages: list[int],
    tiny: Callable[..., PretrainRecipe],
) -> None:
    """And at a stage at which DeepSpeed does so without another optimiser."""
    recipe = tiny(train={**train, "total_batch": 8 * accumulation, "micro_batch": 8})
    plan = make_plan(recipe, world_size=1)
    for given, stage in enumerate(stages):
        tree = {**AUTO, "zero_optimization": {"stage": given}}
        resolved = resolve(tree, recipe, plan, ORIGIN)
        assert resolved["data_types"]["grad_accum_dtype"] == summed
        assert zero_stage(resolved) == stage


def test_gradients_in_half_precision_of_an_fp32_run_are_refused(
    tiny: Callable[..., PretrainRecipe],
) -> None:
    with pytest.raises(UserError, match=r"train\.grad_dtype=bf16 does not go with .*fp32"):
        tiny(train={"precision": "fp32", "grad_dtype": "bf16"})


def test_what_the_recipe_does_not_own_passes_unchanged(solve: Resolve) -> None:
    own = {
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": 7,
            "offload_param": {"device": "cpu"},
        },
        "bf16": {"enabled": "auto", "immediate_grad_update": True},
        "wall_clock_breakdown": True,
        "steps_per_print": 5,
    }
    resolved = solve({**AUTO, **own})
    assert resolved["zero_optimization"] == own["zero_optimization"]
    assert resolved["bf16"] == {"enabled": True, "immediate_grad_update": True}
    assert resolved["wall_clock_breakdown"] is True
    assert resolved["steps_per_print"] == 5
    assert zero_stage(resolved) == 3


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("zero_optimisation", "zero_optimization"), ("gradient_cliping", "gradient_clipping")],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(
    typo: str, meant: str, solve: Resolve
) -> None:
    message = error_of(solve, {**AUTO, typo: 1})
    assert f'"{typo}"' in message
    assert f'did you mean "{meant}"?' in message


@pytest.mark.parametrize("section", ["optimizer", "scheduler", "amp", "torch_autocast"])
def test_sections_that_the_recipe_owns_are_refused(section: str, solve: Resolve) -> None:
    message = error_of(solve, {**AUTO, section: {"type": "AdamW"}})
    assert f'"{section}" belongs to the recipe' in message


def test_an_auto_that_nobody_decides_is_refused(solve: Resolve) -> None:
    tree = {**AUTO, "zero_optimization": {"stage": 3, "offload_param": {"buffer_size": "auto"}}}
    assert "zero_optimization.offload_param.buffer_size" in error_of(solve, tree)


@pytest.mark.parametrize("stage", [4, -1, "two", "auto", None])
def test_a_stage_that_does_not_exist_is_refused(stage: Any, solve: Resolve) -> None:
    assert "zero_optimization.stage" in error_of(solve, {"zero_optimization": {"stage": stage}})


@pytest.mark.parametrize("size", [0, -2, 1.5, True, "auto", None])
def test_a_sequence_group_is_a_whole_number_of_ranks(size: Any) -> None:
    with pytest.raises(UserError, match=f"{ORIGIN}: sequence_parallel_size="):
        sequence_parallel({"sequence_parallel_size": size}, ORIGIN)
    assert sequence_parallel({}, ORIGIN) == 1


def test_deepspeed_counts_a_clip_once_however_many_ranks_share_it(
    tiny: Callable[..., PretrainRecipe],
) -> None:
    recipe = tiny(train={"total_batch": 48, "micro_batch": 8})
    plan = make_plan(recipe, world_size=8, sequence_parallel=4)
    tree = {**AUTO, "sequence_parallel_size": 4}
    resolved = resolve(tree, recipe, plan, ORIGIN)
    dealt = resolved["train_micro_batch_size_per_gpu"] * resolved["gradient_accumulation_steps"]
    assert dealt * 8 / resolved["sequence_parallel_size"] == resolved["train_batch_size"] == 48


def test_sharing_tokens_of_compiled_layers_is_refused(tiny: Callable[..., PretrainRecipe]) -> None:
    recipe = tiny(train={"compile": True})
    plan = make_plan(recipe, world_size=2, sequence_parallel=2)
    with pytest.raises(UserError, match=r"Set train\.compile=false"):
        resolve({**AUTO, "sequence_parallel_size": 2}, recipe, plan, ORIGIN)


@pytest.mark.parametrize(
    ("changes", "able", "expected"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"zero_optimization": {"stage": 3}}, True, False),
        ({"zero_optimization": {"stage": 2, "overlap_comm": True}}, True, False),
        ({"sequence_parallel_size": 2}, True, False),
    ],
)
def test_a_run_compiles_by_itself_where_nothing_known_forbids_it(
    changes: dict[str, Any], able: bool, expected: bool, tiny: Callable[..., PretrainRecipe]
) -> None:
    recipe = tiny()
    plan = make_plan(recipe, world_size=2, sequence_parallel=changes.get(SEQUENCE_PARALLEL, 1))
    resolved = resolve({**AUTO, **changes}, recipe, plan, ORIGIN)
    assert compiles(recipe, resolved, able=able) == expected
    assert not compiles(tiny(train={"compile": False}), resolved, able=able)


def test_compile_is_true_false_or_auto(tiny: Callable[..., PretrainRecipe]) -> None:
    plan = make_plan(tiny(), world_size=2)
    assert compiles(tiny(train={"compile": True}), resolve(AUTO, tiny(), plan, ORIGIN), able=False)
    for wrong in (7, "sometimes", None):
        with pytest.raises(UserError, match=r"train\.compile"):
            tiny(train={"compile": wrong})


@pytest.mark.parametrize("key", ["offload_optimizer", "offload_param"])
def test_offload_without_partitioning_is_refused(key: str, solve: Resolve) -> None:
    tree = {"zero_optimization": {"stage": 1, key: {"device": "cpu"}}}
    assert key in error_of(solve, tree)


@pytest.mark.parametrize("key", ["zero_optimization", "bf16", "fp16", "activation_checkpointing"])
def test_a_section_that_is_no_object_is_refused(key: str, solve: Resolve) -> None:
    assert f'"{key}"' in error_of(solve, {**AUTO, key: True})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"a": 1,\n "b": }', "line 2"),
        (b"", "Expecting value"),
        (b"[1]", "one JSON object"),
        (b"\xff\xfe{}", "cannot read"),
        (None, "ds_configs/"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(
    content: bytes | None, says: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        read_deepspeed_json(path)
    assert str(path) in str(raised.value)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, "wrong gradients"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            'an offload to device "nvme"',
        ),
        ({"bf16": {"enabled": "auto", "check_grad_overflow": False}}, "not finite"),
        ({"compile": {}}, "train.compile of the recipe"),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, "decoder layers"),
        ({"activation_checkpointing": {"partition_activations": True}}, "model parallelism"),
        ({"activation_checkpointing": {"every": 0}}, "expected 1 or more"),
        ({"activation_checkpointing": {"evry": 2}}, 'did you mean "every"'),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "stage 3"),
    ],
)
def test_what_is_known_to_train_wrongly_is_refused_with_the_reason(
    changes: dict[str, Any], words: str, solve: Resolve
) -> None:
    assert words in error_of(solve, {**AUTO, **changes})


@pytest.mark.parametrize(
    ("zero", "recipe", "words"),
    [
        ({"stage": 3}, {"train": {"compile": True}}, "does not work at stage 3"),
        ({"stage": 2, "overlap_comm": True}, {"train": {"compile": True}}, "lost gradients"),
        (
            {"stage": 0},
            {"optim": {"implementation": "deepspeed"}, "train": {"precision": "fp32"}},
            "Use torch",
        ),
    ],
)
def test_recipe_and_json_that_do_not_go_together_are_refused(
    zero: dict[str, Any], recipe: dict[str, Any], words: str, tiny: Callable[..., PretrainRecipe]
) -> None:
    made = tiny(**recipe)
    plan = make_plan(made, world_size=1)
    assert words in error_of(
        lambda tree: resolve(tree, made, plan, ORIGIN), {**AUTO, "zero_optimization": zero}
    )


def test_all_phases_sum_their_gradients_in_one_type() -> None:
    """DeepSpeed's buffers are made once, although only the second phase accumulates."""
    phases = "phases=[{share: 0.5, train.total_batch: 16}, {share: 0.5}]"
    recipe = load_recipe("demo", ["train.precision=bf16", "train.micro_batch=16", phases])
    resolved = resolve(AUTO, recipe, make_plan(recipe, world_size=1), ORIGIN)
    assert resolved["data_types"]["grad_accum_dtype"] == "fp32"
    assert resolved["zero_optimization"]["stage"] == 2
    assert (resolved["train_batch_size"], resolved["gradient_accumulation_steps"]) == (16, 1)
