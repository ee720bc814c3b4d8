"""The adviser's formulas against what DeepSpeed holds and sends, on 1 and 3 CPU ranks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arvideo_ds.config import load_recipe
from arvideo_ds.planning.advice import sent_bytes
from arvideo_ds.planning.memory import ModelStates, Strategy, model_states, stage_of_run
from arvideo_ds.planning.plan import make_plan

pytestmark = pytest.mark.dist
ROOT = Path(__file__).parent.parent.parent

BUCKET = 1_000_000
SMALL_BUCKETS = {
    "reduce_bucket_size": BUCKET,
    "allgather_bucket_size": BUCKET,
    "stage3_prefetch_bucket_size": BUCKET,
}
# ViT-S with eight tokens: 24 M parameters, hardly an activation beside them, and little to compute,
# since a CPU without AVX512 takes 60 times as long in bf16.
RECIPE = [
    "ablation_base",
    "model.size=S",
    "data.frames=4",
    "data.size=32",
    "objective.cluster=[1,2,2]",
    "data.num_streams=12",
    "data.num_videos=100",
    "data.repeats=1",
    "train.total_batch=3",
    "train.micro_batch=1",  # accumulated 3 times on 1 rank, not on 3
]
CASES: list[dict[str, Any]] = [
    {"stage": stage, "precision": precision, "zero": SMALL_BUCKETS, "recipe": RECIPE}
    for precision, stages in (("fp32", (0, 2)), ("bf16", (1, 2, 3)))
    for stage in stages
] + [
    # Weights that ZeRO-3 lets go and gathers again.
    {
        "stage": 3,
        "precision": "bf16",
        "zero": {
            **SMALL_BUCKETS,
            "stage3_max_live_parameters": 5_000_000,
            "stage3_max_reuse_distance": 20_000_000,
        },
        "recipe": RECIPE,
    }
]
OFFLOAD = {"device": "cpu", "pin_memory": False}
# On a CPU all of it lies in one memory, so only sums can be compared.
OFFLOADED: list[dict[str, Any]] = [
    {
        "stage": stage,
        "precision": "bf16",
        "zero": {**SMALL_BUCKETS, **offload},
        "recipe": RECIPE,
    }
    for stage, offload in (
        (2, {"offload_optimizer": OFFLOAD}),
        (3, {"offload_optimizer": OFFLOAD, "offload_param": OFFLOAD}),
    )
]


@pytest.fixture(scope="module", params=[1, 3])
def measured(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    on_ranks: Callable[..., list[list[dict[str, Any]]]],
) -> tuple[int, list[list[dict[str, Any]]]]:
    """Number of ranks, and for each rank the bytes of every case."""
    cases = tmp_path_factory.mktemp("states") / "cases.json"
    cases.write_text(json.dumps([*CASES, *OFFLOADED]))
    return request.param, on_ranks("measure_model_states.py", request.param, cases)


def predicted(case: dict[str, Any], ranks: int) -> tuple[ModelStates, int]:
    """Bytes held, and bytes sent in a step."""
    name, *overrides = case["recipe"]
    recipe = load_recipe(name, [*overrides, f"train.precision={case['precision']}"])
    tree = json.loads((ROOT / "ds_configs" / f"zero{case['stage']}.json").read_text())
    tree["zero_optimization"].update(case["zero"])
    strategy = Strategy.from_json(tree)
    accumulation = make_plan(recipe, world_size=ranks).accumulation
    stage = stage_of_run(strategy.stage, recipe, accumulation)
    strategy = dataclasses.replace(strategy, stage=stage)
    states = model_states(recipe, strategy, world_size=ranks, accumulation=accumulation)
    return states, sent_bytes(recipe, strategy, ranks, accumulation)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"zero{c['stage']}-{c['precision']}")
def test_model_states_are_what_lives(
    case: dict[str, Any], measured: tuple[int, list[list[dict[str, Any]]]]
) -> None:
    ranks, found = measured
    states, _ = predicted(case, ranks)
    # Stages 1 and 2 make the bucket in the backward pass and keep it between micro-steps or not.
    always = states.bucket if case["stage"] == 3 else 0
    for rank in range(ranks):
        seen = found[rank][CASES.index(case)]
        near = pytest.approx
        assert seen["rest"]["parameters"] == near(states.parameters, rel=0.05)
        assert seen["rest"]["optimizer"] == near(states.optimizer, rel=0.05)
        assert seen["forward"]["parameters"] == near(states.parameters + states.gathered, rel=0.05)
        slack = 0.01 * sum(seen["rest"].values()) + (states.bucket if case["stage"] < 3 else 0)
        for instant, expected in (
            ("held", states.held),
            ("backward", states.gradients),
            ("update", states.update),
        ):
            assert seen[instant]["gradients"] == near(expected + always, rel=0.05, abs=slack), (
                instant
            )
        total = sum(seen["update"].values())
        assert total == near(states.rest + states.update + always, rel=0.05)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"zero{c['stage']}-{c['precision']}")
def test_a_step_sends_what_the_formula_says(
    case: dict[str, Any], measured: tuple[int, list[list[dict[str, Any]]]]
) -> None:
    ranks, found = measured
    _, sent = predicted(case, ranks)
    for rank in range(ranks):
        assert found[rank][CASES.index(case)]["sent"] == pytest.approx(sent, rel=0.05, abs=1e5)


@pytest.mark.parametrize("case", OFFLOADED, ids=["zero2", "zero3"])
def test_gpu_and_host_together_hold_what_is_offloaded(
    case: dict[str, Any], measured: tuple[int, list[list[dict[str, Any]]]]
) -> None:
    ranks, found = measured
    states, _ = predicted(case, ranks)
    bucket = states.bucket if case["stage"] == 3 else 0
    for rank in range(ranks):
        seen = found[rank][len(CASES) + OFFLOADED.index(case)]
        total = states.rest + states.update + states.host + bucket
        assert sum(seen["update"].values()) == pytest.approx(total, rel=0.05)
