"""The cost model against the modules themselves: PyTorch counts, the formulas must agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from arvideo_ds.config import FinetuneRecipe, PretrainRecipe, load_recipe
from arvideo_ds.config.sizes import SIZES
from arvideo_ds.models.classifier import AttentivePooling
from arvideo_ds.planning.cost import cost_of, forward_passes, parameter_sizes, probe_flops
from arvideo_ds.tasks.finetune import Finetune
from arvideo_ds.tasks.pretrain import build_objective
from tests.conftest import count_parameters

RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {},
    "self-attention": {"decoder": {"self_attention": True}},
    "paper targets": {"objective": {"targets": "paper"}},
    "a share of the targets": {"decoder": {"target_ratio": 0.3}},
    "many kept tokens": {"objective": {"drop_ratio": 0.0}},
    "another decoder": {"decoder": {"width": 64, "depth": 3, "heads": 2}},
    "oblong clip, long clusters": {
        "data": {"frames": 4, "size": [16, 32]},
        "objective": {"cluster": [1, 2, 8]},
    },
    "pixels": {
        "model": {"patch": [1, 1, 1]},
        "data": {"frames": 2, "size": 8},
        "objective": {"normalize_targets": False, "cluster": [1, 4, 4]},
    },
    "VideoMAE": {"objective": {"name": "videomae"}},
    "VideoMAE V2": {"objective": {"name": "videomae", "decoder_mask": "running_cell"}},
    "ViT-S": {"model": {"size": "S"}, "data": {"frames": 4}, "objective": {"cluster": [1, 1, 1]}},
}


@pytest.mark.parametrize("name", RECIPES)
def test_formulas_equal_what_pytorch_counts(name: str, tiny: Callable[..., PretrainRecipe]) -> None:
    recipe = tiny(**RECIPES[name])
    cost, num_clips = cost_of(recipe), 2
    # Shapes decide the count; the meta device has nothing else.
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counted:
        model = build_objective(recipe)
        clips = torch.zeros((num_clips, *recipe.geometry.clip, 3), dtype=torch.uint8)
        model(clips, torch.arange(num_clips))
    assert counted.get_total_flops() == num_clips * cost.flops_forward_per_clip
    assert count_parameters(model.encoder) == cost.parameters_encoder
    assert count_parameters(model.decoder) == cost.parameters_decoder
    assert count_parameters(model) == cost.parameters_encoder + cost.parameters_decoder
    for part, sizes in zip((model.encoder, model.decoder), parameter_sizes(recipe), strict=True):
        assert sorted(p.numel() for p in part.parameters()) == sorted(sizes)


@pytest.mark.parametrize("pooling", ["mean", "attention"])
@pytest.mark.parametrize("drop_tokens", [0.0, 0.3])
def test_formulas_of_fine_tuning_equal_what_pytorch_counts(
    pooling: str, drop_tokens: float, tiny_finetune: Callable[..., FinetuneRecipe]
) -> None:
    settings = {"pooling": pooling, "drop_tokens": drop_tokens, "mixup": 0, "cutmix": 0}
    recipe, num_clips = tiny_finetune(finetune=settings), 2
    cost, width = cost_of(recipe), recipe.size.width
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counted:
        task = Finetune(recipe, 3).requires_grad_(
            False
        )  # what counts cannot track a view of a leaf
        clips = torch.zeros((num_clips, *recipe.geometry.clip, 3), dtype=torch.uint8)
        task.model(clips, task._seen(torch.arange(num_clips)))
    head = 2 * width * 3
    assert counted.get_total_flops() == num_clips * (cost.flops_forward_per_clip + head)
    assert count_parameters(task) == cost.parameters_encoder + 3 * width + 3


def test_long_fine_tuning_encodes_the_tokens_of_its_source() -> None:
    """LVMAE: 128 frames of 224 x 224 are 12,544 tokens; a fifth of the places is left out."""
    shape = ["data.frames=128", "finetune.drop_tokens=0.2"]
    recipe = load_recipe("finetune_vit_b_k400", shape, FinetuneRecipe)
    assert recipe.geometry.num_tokens == 12_544
    assert recipe.counts.encoded == 64 * 157


@pytest.mark.parametrize("depth", [1, 3])
def test_formulas_of_attentive_heads_equal_what_pytorch_counts(
    depth: int, tiny_finetune: Callable[..., FinetuneRecipe]
) -> None:
    """Two heads that pool the tokens of three clips of a video together."""
    grid = {"head_lrs": [0.1, 0.2], "head_weight_decays": [0.0]}
    frozen = {"train": "head", "layer_decay": 1, "drop_path": 0, "mixup": 0, "cutmix": 0}
    recipe = tiny_finetune(
        data={"repeats": 3, "segments": True},
        finetune={"pooling": "attentive", "pooling_depth": depth, **frozen, **grid},
        train={"total_batch": 6, "micro_batch": 6, "max_steps": 1},
    )
    cost, width = cost_of(recipe), recipe.size.width
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counted:
        task = Finetune(recipe, 3).requires_grad_(False)
        clips = torch.zeros((3, *recipe.geometry.clip, 3), dtype=torch.uint8)
        task.model(clips, views=(3, 1))
    heads = 2 * 2 * width * 3
    assert abs(counted.get_total_flops() - heads - 3 * cost.flops_forward_per_clip) < 3
    assert count_parameters(task) == cost.parameters_encoder + 2 * (3 * width + 3)
    trained = count_parameters(task.model.heads) - 2 * (3 * width + 3)
    assert cost.parameters_trained == trained
    # The heads' backward pass costs twice their forward pass, the encoder's nothing.
    alone = cost_of(recipe).flops_forward_per_clip - probe_flops(recipe)
    expected = (alone + 3 * probe_flops(recipe)) / cost.flops_forward_per_clip
    assert forward_passes(recipe) == pytest.approx(expected)


def test_the_head_of_v_jepa_2_has_the_parameters_of_its_published_structure() -> None:
    """ViT-L: three blocks of 12 D^2 + 13 D, a query's block of 11 D^2 + 12 D without an output
    projection, the query and 174 classes (src/models/attentive_pooler.py, configs/eval/vitl)."""
    width, classes = 1024, 174
    block, query = 12 * width**2 + 13 * width, 11 * width**2 + 12 * width
    published = 3 * block + query + width + (width + 1) * classes
    with torch.device("meta"):
        pooling = AttentivePooling(width, heads=16, depth=4)
    assert count_parameters(pooling) + (width + 1) * classes == published
    one_head = ["finetune.head_lrs=[]", "finetune.head_weight_decays=[]"]
    recipe = load_recipe("probe_vit_l_ssv2", one_head, FinetuneRecipe)
    assert cost_of(recipe).parameters_trained == published


@pytest.mark.parametrize("size", SIZES)
def test_every_size_has_the_parameters_that_the_plan_says(size: str) -> None:
    overrides = [f"model.size={size}", "model.patch=[2,16,16]", "objective.cluster=[2,7,7]"]
    recipe = load_recipe("ablation_base", overrides)
    with torch.device("meta"):
        model = build_objective(recipe)
    cost = cost_of(recipe)
    assert count_parameters(model.encoder) == cost.parameters_encoder
    assert count_parameters(model.decoder) == cost.parameters_decoder


def test_forward_cost_of_the_published_shapes() -> None:
    """GFLOP per clip of ViT-B: ARVideo at most 93, 75, 66, as another implementation counts.

    VideoMAE's official code counts 70.9; it embeds all 1568 tokens, of which 1408 are thrown away.
    """
    arvideo = [
        cost_of(load_recipe("pretrain_vit_b_k400", [f"decoder.target_ratio={share}"]))
        for share in (1.0, 0.5, 0.25)
    ]
    for cost, published in zip(arvideo, (93, 75, 66), strict=True):
        assert cost.flops_forward_per_clip / 1e9 < published + 0.5
    recipe = load_recipe("videomae_vit_b_k400")
    wasted = 2 * 1408 * recipe.geometry.cube_values * recipe.size.width
    official = (cost_of(recipe).flops_forward_per_clip + wasted) / 1e9
    assert official == pytest.approx(70.9, rel=0.01)


def test_a_smaller_share_of_targets_costs_less_and_no_parameter(
    tiny: Callable[..., PretrainRecipe],
) -> None:
    full, half = (cost_of(tiny(decoder={"target_ratio": r})) for r in (1.0, 0.5))
    assert half.flops_forward_per_clip < full.flops_forward_per_clip
    assert half.parameters_decoder == full.parameters_decoder
