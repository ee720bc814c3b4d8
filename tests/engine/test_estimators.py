"""Where DeepSpeed's own estimators agree with the adviser, and what they leave out."""

from __future__ import annotations

import pytest
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

from arvideo_ds.config import PretrainRecipe, load_recipe
from arvideo_ds.planning.cost import parameter_sizes
from arvideo_ds.planning.memory import ModelStates, Strategy, model_states

RANKS = 8


def states(recipe: PretrainRecipe, stage: int) -> tuple[ModelStates, list[int]]:
    encoder, decoder = parameter_sizes(recipe)
    return model_states(recipe, Strategy(stage=stage), world_size=RANKS), encoder + decoder


@pytest.mark.parametrize("size", ["b", "g"])
def test_stage_2_agrees_in_half_precision_alone(size: str) -> None:
    for precision, missing in (("bf16", 0), ("fp32", 2)):
        recipe = load_recipe(f"pretrain_vit_{size}_k400", [f"train.precision={precision}"])
        ours, sizes = states(recipe, stage=2)
        _, theirs = estimate_zero2_model_states_mem_needs(sum(sizes), RANKS, cpu_offload=False)
        # They count weights and gradients of two bytes whatever the precision.
        left_out = missing * (sum(sizes) + sum(sizes) // RANKS)
        assert ours.rest + ours.update == pytest.approx(theirs + left_out, rel=0.001)


@pytest.mark.parametrize("size", ["b", "g"])
def test_stage_3_leaves_out_the_weights_own_parts_and_those_that_stay_gathered(size: str) -> None:
    recipe = load_recipe(f"pretrain_vit_{size}_k400")
    ours, sizes = states(recipe, stage=3)
    _, theirs, largest = estimate_zero3_model_states_mem_needs(
        sum(sizes), max(sizes), RANKS, cpu_offload=False
    )
    own_part = 2 * sum(sizes) // RANKS
    assert ours.rest + ours.update == pytest.approx(theirs - largest + own_part, rel=0.02)
    assert ours.gathered > 3 * largest
