"""Model states under ZeRO: what follows from what; tests/engine/test_model_states.py measures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from arvideo_ds.config import FinetuneRecipe, PretrainRecipe, load_recipe
from arvideo_ds.planning.cost import parameter_sizes
from arvideo_ds.planning.memory import Strategy, footprint, model_states

ROOT = Path(__file__).parent.parent.parent
MODELS = ["pretrain_vit_b_k400", "pretrain_vit_g_k400"]


def from_file(name: str) -> Strategy:
    return Strategy.from_json(json.loads((ROOT / "ds_configs" / f"{name}.json").read_text()))


def parameters(recipe: PretrainRecipe) -> int:
    return sum(map(sum, parameter_sizes(recipe)))


def test_our_json_files_say_what_their_names_say() -> None:
    assert [from_file(f"zero{stage}").stage for stage in range(4)] == [0, 1, 2, 3]
    assert not any(from_file(f"zero{stage}").offloads for stage in range(4))
    assert from_file("zero2").reduce_bucket == 100_000_000
    assert from_file("zero2_checkpointing").recompute == 1
    offload = from_file("zero3_offload")
    assert offload.offload_optimizer
    assert offload.offload_parameters


def test_deepspeed_defaults_hold_where_a_json_is_silent() -> None:
    assert Strategy.from_json({}) == Strategy()
    silent = Strategy.from_json({"zero_optimization": {"stage": 3}})
    assert silent.overlap_comm  # only stage 3 overlaps unasked
    assert not Strategy.from_json({"zero_optimization": {"stage": 2}}).overlap_comm
    none = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}}
    assert not Strategy.from_json(none).offloads


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_stage_holds_less_between_steps_than_the_one_before(
    name: str, precision: str
) -> None:
    recipe = load_recipe(name, [f"train.precision={precision}", f"train.grad_dtype={precision}"])
    rest = [
        model_states(recipe, Strategy(stage=stage), world_size=16, accumulation=2)
        for stage in range(4)
    ]
    assert rest[0].rest > rest[1].rest == rest[2].rest > rest[3].rest
    assert rest[1].held > rest[2].held


@pytest.mark.parametrize("stage", [2, 3])
def test_gradients_summed_in_fp32_take_their_bytes(stage: int) -> None:
    half, whole = (
        model_states(
            load_recipe(MODELS[0], [f"train.grad_dtype={name}"]),
            Strategy(stage=stage),
            world_size=1,
            accumulation=4,
        )
        for name in ("bf16", "auto")
    )
    assert whole.held == whole.gradients == 2 * half.held
    assert whole.rest == half.rest


@pytest.mark.parametrize(("stage", "ranks"), [(0, 4), (1, 4), (2, 4), (3, 4)])
def test_a_moving_average_is_one_more_fp32_copy_of_the_masters(stage: int, ranks: int) -> None:
    without, kept = (
        model_states(
            load_recipe("finetune_vit_b_k400", [f"finetune.ema_decay={decay}"], FinetuneRecipe),
            Strategy(stage=stage),
            world_size=ranks,
        )
        for decay in ("null", 0.999)
    )
    # Two moments, and under ZeRO masters beside the weights.
    assert kept.optimizer == pytest.approx(without.optimizer * (4 / 3 if stage else 3 / 2))


def test_one_rank_in_fp32_pays_a_second_copy_of_the_weights_under_zero() -> None:
    recipe = load_recipe("pretrain_vit_b_k400", ["train.precision=fp32"])
    plain, zero = (model_states(recipe, Strategy(stage=s), world_size=1).rest for s in (0, 1))
    assert zero - plain == 4 * parameters(recipe)


def test_one_rank_alone_reduces_nothing() -> None:
    recipe = load_recipe("pretrain_vit_b_k400", ["train.precision=fp32"])
    alone, two = (model_states(recipe, Strategy(), world_size=n) for n in (1, 2))
    assert alone.bucket_copy == 0 and two.bucket_copy == 4 * parameters(recipe)
    assert alone.rest == two.rest


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_peak_grows_with_the_micro_batch_and_shrinks_with_recomputation(stage: int) -> None:
    recipe = load_recipe("pretrain_vit_b_k400")

    def peak(micro_batch: int, recompute: int = 0) -> int:
        strategy = Strategy(stage=stage, recompute=recompute)
        return footprint(
            recipe, strategy, world_size=8, micro_batch=micro_batch, accumulation=2
        ).peak

    assert peak(32) > peak(16) > peak(16, recompute=2) > peak(16, recompute=1)


def test_offloaded_states_are_in_the_host_and_not_on_the_gpu() -> None:
    recipe = load_recipe("pretrain_vit_g_k400")
    here, away = (
        model_states(recipe, Strategy(stage=3, **flags), world_size=8)
        for flags in ({}, {"offload_optimizer": True, "offload_parameters": True})
    )
    assert here.host == away.optimizer == away.gradients == 0
    assert away.host > here.optimizer + here.parameters
    assert away.parameters < 0.1 * here.parameters


def test_zero_3_with_everything_persistent_gathers_nothing(
    tiny: Callable[..., PretrainRecipe],
) -> None:
    recipe = tiny()
    states = model_states(recipe, Strategy(stage=3, persistence_threshold=10**9), world_size=4)
    assert states.gathered == 0
    assert states.parameters >= 4 * parameters(recipe) * 1.25
