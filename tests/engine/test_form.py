"""A model takes the form of another clip and is then as if it had been built for it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from arvideo_ds.config import PretrainRecipe, load_recipe
from arvideo_ds.data.loader import Batch
from arvideo_ds.engine.form import Form
from arvideo_ds.errors import UserError
from arvideo_ds.models.positions import interpolated_positions
from arvideo_ds.tasks.pretrain import Pretrain

PHASES = {
    "arvideo": "objective.cluster: [2, 2, 2]",
    "videomae": "objective.mask_ratio: 0.75",
}


def batch_of(size: int) -> Batch:
    torch.manual_seed(1)
    clips = torch.randint(256, (2, 8, size, size, 3), dtype=torch.uint8)
    keys = torch.tensor([3, 4])
    return Batch(clips=clips, keys=keys, labels=keys, valid=torch.ones(2, dtype=torch.bool))


def forms_of(objective: str) -> list[PretrainRecipe]:
    """Recipes of a small demo in clips of 16 and of 32 pixels."""
    phases = f"phases=[{{share: 0.5, data.size: 16, {PHASES[objective]}}}, {{share: 0.5}}]"
    return load_recipe("demo" if objective == "arvideo" else "videomae_demo", [phases]).by_phase()


@pytest.mark.parametrize("objective", PHASES)
def test_a_model_of_another_form_is_the_one_built_for_those_clips(objective: str) -> None:
    small, large = forms_of(objective)
    torch.manual_seed(0)
    model = Pretrain(small)
    torch.manual_seed(0)
    built = Pretrain(large)
    weights = dict(model.named_parameters())
    assert not torch.equal(model(batch_of(32)), built(batch_of(32)))
    Form(built).give_to(model)
    assert torch.equal(model(batch_of(32)), built(batch_of(32)))
    assert all(weights[key] is parameter for key, parameter in model.named_parameters())
    Form(Pretrain(small)).give_to(model)
    assert model(batch_of(16)).isfinite()


def test_the_online_probe_sees_the_recipes_own_clips_in_every_phase() -> None:
    outputs = []
    for recipe in forms_of("arvideo"):
        torch.manual_seed(0)
        outputs.append(Pretrain(recipe).eval()(batch_of(32)))
    assert torch.equal(*outputs)
    torch.manual_seed(0)
    assert torch.equal(Pretrain(load_recipe("demo")).eval()(batch_of(32)), outputs[0])


def test_a_place_keeps_its_position_in_smaller_clips() -> None:
    """Positions of a phase are those of the recipe's grid, interpolated, in encoder and decoder."""
    small, large = forms_of("arvideo")
    model = Pretrain(small).model
    for part in (model.encoder, model.decoder):
        table = part.positions
        expected = interpolated_positions(
            "sincos_3d", large.geometry.grid, small.geometry.grid, table.shape[1]
        )
        assert torch.equal(table, expected)


def test_buffers_take_the_type_that_the_engine_gave_them() -> None:
    model = nn.Module()
    model.register_buffer("table", torch.zeros(4, dtype=torch.bfloat16), persistent=False)
    other = nn.Module()
    other.register_buffer("table", torch.ones(9), persistent=False)
    Form(other).give_to(model)
    assert (model.table.dtype, model.table.shape) == (torch.bfloat16, (9,))


def test_learned_positions_are_refused_before_the_first_step() -> None:
    one, other = nn.Embedding(4, 8), nn.Embedding(16, 8)
    with pytest.raises(UserError, match=r"phases\.1 changes 2 weights .*weight"):
        Form(other).require_parameters_of(Form(one), "phases.1")
