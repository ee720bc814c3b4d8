"""Parameter groups: every parameter once, vectors without decay, nothing empty."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from arvideo_ds.config import FinetuneRecipe, PretrainRecipe
from arvideo_ds.optim.groups import parameter_groups
from arvideo_ds.tasks.finetune import Finetune
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


def test_the_query_of_class_attention_does_not_decay_and_learns_as_the_head(
    tiny_finetune: Callable[..., FinetuneRecipe],
) -> None:
    task = Finetune(tiny_finetune(finetune={"pooling": "attention"}), 3)
    groups = {id(p): g for g in parameter_groups(task, 0.05, layer_decay=0.5) for p in g["params"]}
    for name, parameter in task.model.class_attention.named_parameters():
        matrix = parameter.ndim == 2
        assert groups[id(parameter)]["weight_decay"] == (0.05 if matrix else 0), name
        assert groups[id(parameter)]["lr_scale"] == 1, name


@pytest.mark.parametrize("decay", [0.75, 0.9])
def test_each_layer_learns_slower_than_the_one_above(
    decay: float, tiny_finetune: Callable[..., FinetuneRecipe]
) -> None:
    task = Finetune(tiny_finetune(), 3)
    groups = parameter_groups(task, 0.05, layer_decay=decay)
    assert all(group["params"] for group in groups)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    depth = 4
    for name, parameter in task.named_parameters():
        layer = depth + 1
        if "blocks." in name:
            layer = 1 + int(name.split("blocks.")[1].split(".")[0])
        elif "embed" in name:
            layer = 0
        assert scale[id(parameter)] == pytest.approx(decay ** (depth + 1 - layer)), name
    assert len(scale) == len(list(task.parameters()))


def test_one_rate_for_all_needs_two_groups(
    tiny_finetune: Callable[..., FinetuneRecipe],
) -> None:
    groups = parameter_groups(Finetune(tiny_finetune(), 3), 0.05)
    assert [group["lr_scale"] for group in groups] == [1, 1]


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
