"""The adviser's activations against what forward and backward really keep, tensor by tensor."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from arvideo_ds.config import FinetuneRecipe, PretrainRecipe, load_recipe
from arvideo_ds.data.loader import Batch
from arvideo_ds.engine.build import checkpoint_activations
from arvideo_ds.engine.peak import LiveBytes
from arvideo_ds.engine.world import start_world
from arvideo_ds.planning.memory import Strategy, activations
from arvideo_ds.tasks.finetune import Finetune
from arvideo_ds.tasks.pretrain import build_objective
from arvideo_ds.tasks.specs.finetune import Finetuning

CLIPS = 2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RECIPES: dict[str, list[str]] = {
    "tiny": ["demo"],
    "tiny, decoder with self-attention": [
        "demo",
        "decoder.self_attention=true",
        "decoder.target_ratio=1.0",
    ],
    "VideoMAE": ["videomae_demo"],
    "VideoMAE V2": ["videomae_demo", "objective.decoder_mask=running_cell"],
    "S": [
        "ablation_base",
        "model.size=S",
        "data.frames=4",
        "data.size=112",
        "objective.cluster=[1,7,7]",
    ],
}


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    """A process group of one: DeepSpeed's recomputation asks for its rank."""
    before = dict(os.environ)
    os.environ["DS_ACCELERATOR"] = "cpu"
    start_world()
    yield
    dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


def kept_and_peak(recipe: PretrainRecipe, recompute: int) -> tuple[int, int]:
    """Bytes alive after a forward pass, and the most alive within it and its backward pass.

    Gradients of weights stand in memory before, so they are no part of either.
    """
    model = build_objective(recipe).to(DTYPES[recipe.train.precision])
    if recompute:
        config: dict[str, Any] = {"train_batch_size": 1, "activation_checkpointing": {}}
        checkpoint_activations(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    clips = torch.zeros((CLIPS, *recipe.geometry.clip, 3), dtype=torch.uint8)
    with LiveBytes() as live:
        loss = model(clips, torch.arange(CLIPS)).sum()
        kept = live.now
        loss.backward()
    return kept, live.peak


def check(arguments: list[str], precision: str, recompute: int) -> None:
    recipe = load_recipe(arguments[0], [*arguments[1:], f"train.precision={precision}"])
    kept, peak = kept_and_peak(recipe, recompute)
    predicted = activations(recipe, CLIPS, Strategy(recompute=recompute))
    assert predicted.saved == pytest.approx(kept, rel=0.05)
    assert predicted.peak == pytest.approx(peak, rel=0.15)


@pytest.mark.parametrize("recompute", [0, 1], ids=["kept", "recomputed"])
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("name", RECIPES)
def test_activations_are_what_autograd_keeps(name: str, precision: str, recompute: int) -> None:
    check(RECIPES[name], precision, recompute)


@pytest.mark.parametrize("recompute", [0, 1], ids=["kept", "recomputed"])
@pytest.mark.parametrize("precision", DTYPES)
def test_activations_of_many_heads_on_a_frozen_encoder(precision: str, recompute: int) -> None:
    """Six heads of four blocks, which pool the tokens of two clips of a video together."""
    overrides = ["model.size=tiny", "data.frames=8", "data.size=32", f"train.precision={precision}"]
    recipe = load_recipe("probe_own", overrides, FinetuneRecipe)
    task = Finetune(recipe, 8).to(DTYPES[precision])
    Finetuning(recipe).freeze(task)
    if recompute:
        checkpoint_activations(task, {"train_batch_size": 1, "activation_checkpointing": {}})
    for parameter in task.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    clips = torch.zeros((2 * CLIPS, *recipe.geometry.clip, 3), dtype=torch.uint8)
    numbers = torch.zeros(2 * CLIPS, dtype=torch.int64)
    batch = Batch(clips, numbers, numbers, numbers == 0)
    with LiveBytes() as live:
        loss = task(batch)
        kept = live.now
        loss.backward()
    predicted = activations(recipe, 2 * CLIPS, Strategy(recompute=recompute))
    assert predicted.saved == pytest.approx(kept, rel=0.05)
    assert predicted.peak == pytest.approx(live.peak, rel=0.15)


@pytest.mark.slow
def test_activations_of_vit_b_on_a_whole_clip() -> None:
    check(["ablation_base", "model.size=B"], "fp32", recompute=0)


def test_recomputing_every_second_layer_lies_between_none_and_all(
    tiny: Callable[..., PretrainRecipe],
) -> None:
    strategies = (Strategy(recompute=k) for k in (0, 1, 2))
    none, all_, half = (activations(tiny(), 4, strategy).saved for strategy in strategies)
    assert all_ < half < none
    # 4 blocks and 2 layers halve evenly.
    assert half == (none + all_) / 2


def test_bytes_of_freed_and_shared_tensors_do_not_count() -> None:
    with LiveBytes() as live:
        kept = torch.zeros(1000)
        view = kept[10:]
        view.add_(1)
        for _ in range(3):
            kept.add(1)  # freed at once
        nowhere = torch.zeros(1000, device="meta")
        assert nowhere.is_meta
    assert live.now == 4000
    assert live.peak == 8000
