"""The order of attention kernels, and the kernels that a run reports."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from arvideo_ds.config import PretrainRecipe, load_recipe
from arvideo_ds.engine.attention import chosen_kernels, preferred_kernels
from arvideo_ds.planning.plan import make_plan

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_a_run_reports_the_kernel_of_each_attention(tiny: Callable[..., PretrainRecipe]) -> None:
    recipe = tiny(decoder={"self_attention": True})
    plan = make_plan(recipe, world_size=1)
    found = chosen_kernels(recipe, plan, CPU)
    assert found == dict.fromkeys(("encoder", "decoder_cross", "decoder_self"), "flash_attention")
    with sdpa_kernel(SDPBackend.MATH):
        assert set(chosen_kernels(recipe, plan, CPU).values()) == {"math"}


def test_a_gpu_takes_cudnn_first_and_a_cpu_keeps_its_own() -> None:
    recipe = load_recipe("pretrain_vit_b_k400")
    before = torch._C._get_sdp_priority_order()
    with preferred_kernels(recipe, CPU):
        assert torch._C._get_sdp_priority_order() == before
    with preferred_kernels(recipe, CUDA):
        first, *_ = torch._C._get_sdp_priority_order()
        assert SDPBackend(first) == SDPBackend.CUDNN_ATTENTION
        assert torch.backends.cuda.cudnn_sdp_enabled()
    assert torch._C._get_sdp_priority_order() == before


@pytest.mark.parametrize(
    ("precision", "frames", "compiled", "kernel"),
    [
        ("bf16", 8, "auto", "math"),
        ("bf16", 8, True, "flash_attention"),
        ("bf16", 64, "auto", "flash_attention"),  # 256 keys
        ("fp32", 8, "auto", "flash_attention"),
    ],
)
def test_a_cpu_takes_the_plain_kernel_for_few_keys_in_bf16(
    precision: str,
    frames: int,
    compiled: bool | str,
    kernel: str,
    tiny: Callable[..., PretrainRecipe],
) -> None:
    recipe = tiny(
        train={"precision": precision, "compile": compiled},
        data={"frames": frames, "size": 16},
        objective={"drop_ratio": 0.0, "cluster": [1, 4, 4]},
    )
    plan = make_plan(recipe, world_size=1)
    with preferred_kernels(recipe, CPU):
        assert set(chosen_kernels(recipe, plan, CPU).values()) == {kernel}


@pytest.mark.parametrize(("name", "used"), [("arvideo", False), ("videomae", True)])
def test_cudnn_is_not_used_where_its_masked_gradients_may_be_nan(
    name: str, used: bool, tiny: Callable[..., PretrainRecipe]
) -> None:
    """64 keys more than a multiple of 128, and a mask: PyTorch issue 196678."""
    settings = {
        "arvideo": {"drop_ratio": 0.0, "cluster": [1, 4, 4]},
        "videomae": {"mask_ratio": 0.75},
    }
    frames = {"arvideo": 10, "videomae": 32}[name]
    recipe = tiny(objective={"name": name, **settings[name]}, data={"frames": frames, "size": 16})
    assert recipe.counts.encoded % 128 == 64
    with preferred_kernels(recipe, CUDA):
        assert torch.backends.cuda.cudnn_sdp_enabled() == used
