"""The adviser: what it recommends follows memory first, then the time of a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from arvideo_ds.config import PretrainRecipe, load_recipe
from arvideo_ds.errors import UserError
from arvideo_ds.planning.advice import (
    Machine,
    Option,
    compare,
    exchanged_bytes,
    micro_batches,
    possible_gpu_counts,
    recommend,
    scaling,
    sent_bytes,
    weigh,
)
from arvideo_ds.planning.memory import Strategy
from arvideo_ds.planning.plan import make_plan

BASE = Strategy(reduce_bucket=100_000_000)


def machine(num_gpus: int = 8, memory_gib: float = 80, bandwidth_gb_s: float = 20) -> Machine:
    return Machine(num_gpus, memory_gib, tflops=100, bandwidth_gb_s=bandwidth_gb_s)


def best(recipe: PretrainRecipe, on: Machine) -> Option:
    found = recommend(compare(recipe, BASE, on))
    assert found is not None
    return found


@pytest.mark.parametrize("size", ["s", "b", "l", "h", "g"])
def test_the_lowest_stage_where_the_model_fits(size: str) -> None:
    option = best(load_recipe(f"pretrain_vit_{size}_k400"), machine())
    # Stage 2 sums gradients in fp32 where there are several.
    assert option.strategy.stage == (1 if option.accumulation == 1 else 2)
    recipe = load_recipe(f"pretrain_vit_{size}_k400", ["train.precision=fp32"])
    assert best(recipe, machine()).strategy.stage == 0


def test_less_memory_asks_for_more_partitioning() -> None:
    recipe = load_recipe("pretrain_vit_g_k400", ["model.size=G"])
    chosen = {gib: best(recipe, machine(64, gib)) for gib in (80, 40, 16, 6)}
    stages = [option.strategy.stage for option in chosen.values()]
    assert stages == sorted(stages)
    assert stages[0] == 1 < stages[-1]
    for gib, option in chosen.items():
        assert option.footprint.peak <= 0.9 * gib * 2**30


def test_where_nothing_fits_nothing_is_recommended() -> None:
    recipe = load_recipe("pretrain_vit_g_k400")
    assert recommend(compare(recipe, BASE, machine(1, 1))) is None


def test_offloading_comes_last_and_promises_no_time() -> None:
    recipe = load_recipe("pretrain_vit_g_k400", ["model.size=G"])
    option = best(recipe, machine(1, 16))
    assert option.strategy.offloads
    assert option.step_s is None
    assert not best(recipe, machine(64, 16)).strategy.offloads


def test_a_larger_micro_batch_would_not_have_fitted() -> None:
    recipe, on = load_recipe("pretrain_vit_b_k400"), machine(memory_gib=8)
    for option in compare(recipe, BASE, on):
        assert option.micro_batch * option.accumulation * on.num_gpus == recipe.train.total_batch
    option = best(recipe, on)
    larger = [m for m in micro_batches(recipe, on.num_gpus) if m > option.micro_batch]
    assert larger
    assert best(recipe, machine(memory_gib=1000)).micro_batch == max(larger)


def test_micro_batches_hold_the_repeats_of_a_video_together(
    tiny: Callable[..., PretrainRecipe],
) -> None:
    recipe = tiny(
        data={"repeats": 2, "num_streams": 12}, train={"total_batch": 24, "micro_batch": 12}
    )
    assert micro_batches(recipe, 2) == [12, 6, 4, 2]
    with pytest.raises(UserError, match="cannot share"):
        micro_batches(recipe, 5)


def test_stages_1_and_2_send_more_than_plain_data_parallel() -> None:
    recipe = load_recipe("pretrain_vit_b_k400")
    zero, one, two, three = (sent_bytes(recipe, Strategy(stage=s), 8, 4) for s in range(4))
    assert zero < one < three < two
    assert sent_bytes(recipe, Strategy(stage=0), 1, 4) == 0
    assert sent_bytes(recipe, Strategy(stage=1), 8, 1) == sent_bytes(
        recipe, Strategy(stage=2), 8, 1
    )


def test_the_scaling_table_gets_faster_and_says_what_it_needs() -> None:
    recipe = load_recipe("pretrain_vit_b_k400")
    rows = scaling(recipe, BASE, machine(), [1, 8, 64, 128, 1024, 48, 2048])
    *fine, odd, too_many = rows
    seconds = [row.option.step_s for row in fine if row.option and row.option.step_s]
    assert len(seconds) == len(fine)
    assert seconds == sorted(seconds, reverse=True)
    for row in fine:
        data = recipe.data.model_copy(update={"num_streams": row.num_streams})
        plan = make_plan(recipe.model_copy(update={"data": data}), world_size=row.num_gpus)
        assert plan.total_batch == recipe.train.total_batch
    assert fine[0].num_streams == recipe.data.num_streams
    for row in (odd, too_many):
        assert row.option is None
        assert "cannot be divided" in str(row.refused)


def test_possible_counts_are_those_that_the_plan_takes() -> None:
    recipe = load_recipe("pretrain_vit_b_k400")
    taken = []
    for count in range(1, 100):
        try:
            make_plan(recipe, world_size=count)
        except UserError:
            continue
        taken.append(count)
    assert possible_gpu_counts(recipe, 99) == taken


def test_a_faster_network_makes_steps_faster_and_nothing_else() -> None:
    recipe = load_recipe("pretrain_vit_l_k400")
    slow, fast = (weigh(recipe, BASE, 16, machine(bandwidth_gb_s=b)) for b in (5, 50))
    assert slow.communication_s == pytest.approx(10 * fast.communication_s)
    assert dataclasses.replace(slow, communication_s=0) == dataclasses.replace(
        fast, communication_s=0
    )


def test_ranks_that_share_tokens_hold_less_for_as_many_clips() -> None:
    recipe, on = load_recipe("pretrain_vit_b_k400"), machine(8)
    alone, shared = (weigh(recipe, Strategy(sequence_parallel=s), 16, on) for s in (1, 4))
    assert shared.micro_batch * shared.accumulation * 2 == recipe.train.total_batch
    assert alone.micro_batch * alone.accumulation * 8 == recipe.train.total_batch
    assert shared.footprint.activations.saved < alone.footprint.activations.saved
    # The decoder runs on every rank of a group.
    assert alone.compute_s < shared.compute_s < 4 * alone.compute_s
    assert shared.sent_bytes > alone.sent_bytes


def test_what_ranks_that_share_tokens_exchange_counted_by_hand() -> None:
    recipe = load_recipe("pretrain_vit_b_k400", ["train.precision=bf16"])
    assert exchanged_bytes(recipe, Strategy(), 5) == 0
    # 300 tokens of 768 values in bf16, on 4 ranks; 12 layers, q, k, v, out, forward and backward.
    own = 75 * 768 * 2
    layers, ends = 12 * 4 * 2 * own * 3 // 4, 2 * own * 3
    assert exchanged_bytes(recipe, Strategy(sequence_parallel=4), 5) == 5 * (layers + ends)


def test_numbers_of_gpus_are_whole_groups() -> None:
    recipe = load_recipe("pretrain_vit_b_k400")
    counts = possible_gpu_counts(recipe, 256, 4)
    assert counts == [4 * n for n in possible_gpu_counts(recipe, 64)]
    refused = {
        s.num_gpus: s.refused
        for s in scaling(recipe, Strategy(sequence_parallel=4), machine(), [2, 8])
    }
    assert "whole groups" in str(refused[2])
    assert refused[8] is None
