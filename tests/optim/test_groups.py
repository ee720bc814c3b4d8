"""Parameter groups: every parameter once, vectors without decay, nothing empty."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from arvideo_ds.config import PretrainRecipe
from arvideo_ds.optim.groups import parameter_groups
from arvideo_ds.tasks.pretrain import Pretrain


def test_every_parameter_of_the_task_stands_in_one_group(
    tiny: Callable[..., PretrainRecipe],
) -> None:
    task = Pretrain(tiny(decoder={"self_attention": True}))
    groups = parameter_groups(task, 0.05)
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in task.parameters())
    torch.optim.AdamW(groups)


def test_matrices_decay_and_biases_norms_and_the_query_do_not(
    tiny: Callable[..., PretrainRecipe],
) -> None:
    task = Pretrain(tiny())
    decay = {id(p): g["weight_decay"] for g in parameter_groups(task, 0.05) for p in g["params"]}
    for module in task.modules():
        if isinstance(module, nn.Linear):
            assert decay[id(module.weight)] == 0.05
            assert module.bias is None or decay[id(module.bias)] == 0
        if isinstance(module, nn.LayerNorm):
            assert decay[id(module.weight)] == decay[id(module.bias)] == 0
    assert decay[id(task.model.decoder.query)] == 0


def test_no_group_is_empty() -> None:
    assert [len(g["params"]) for g in parameter_groups(nn.LayerNorm(3), 0.1)] == [2]
    assert [len(g["params"]) for g in parameter_groups(nn.Linear(3, 3, bias=False), 0.1)] == [1]


def test_frozen_parameters_are_left_out_and_shared_ones_stand_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].bias.requires_grad_(False)
    model[1].weight = model[0].weight
    listed = [p for group in parameter_groups(model, 0.1) for p in group["params"]]
    assert {id(p) for p in listed} == {id(model[0].weight), id(model[1].bias)}
    assert len(listed) == 2
