"""GPUs by name, and what the data must deliver for them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from arvideo_ds.config import PretrainRecipe
from arvideo_ds.planning.data import assumed_rate, layers_in_words, supply
from arvideo_ds.planning.gpus import GPUS, peak_of

Run = Callable[..., subprocess.CompletedProcess[str]]
PLAN = Path(__file__).parent.parent.parent / "scripts" / "plan.py"
VIT_B = ("--recipe", "pretrain_vit_b_k400", "--gpus", "8")


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA GeForce RTX 4090", "4090"),
    ],
)
def test_a_device_has_the_peak_of_its_model(device: str, name: str) -> None:
    assert peak_of(device, "bf16") == GPUS[name].peak_tflops
    # The table is of half precision, and a laptop's chip is another one.
    assert peak_of(device, "fp32") is None
    assert peak_of(device + " Laptop GPU", "bf16") is None


def test_no_device_is_in_two_rows() -> None:
    devices = [device for gpu in GPUS.values() for device in gpu.devices]
    assert len(devices) == len(set(devices))


def test_a_named_gpu_gives_memory_and_rate(run: Run) -> None:
    named = run(sys.executable, PLAN, *VIT_B, "--gpu", "h200", "--cores_per_gpu", "2")
    assert named.returncode == 0, named.stderr
    assert "8 GPU(s) of 141 GiB" in named.stdout
    assert "395.8 TFLOP/s achieved in matrix products per GPU (40% of 989.5" in named.stdout
    assert re.search(r"warning: 16 cores decode \d+ clips/s", named.stdout)
    flags = ("--gpu_memory_gib", "40", "--tflops", "90", "--decode_clips_per_s_per_core", "1e6")
    given = run(sys.executable, PLAN, *VIT_B, "--gpu", "h200", "--cores_per_gpu", "2", *flags)
    assert "8 GPU(s) of 40 GiB" in given.stdout
    assert "- 90 TFLOP/s achieved in matrix products per GPU; a" in given.stdout
    assert "warning" not in given.stdout


@pytest.mark.parametrize(
    ("flags", "words"),
    [(("--gpu", "h300"), "expected one of h200, h100"), ((), "or --gpu_memory_gib")],
)
def test_an_unknown_gpu_is_refused_with_the_list(
    flags: tuple[str, ...], words: str, run: Run
) -> None:
    done = run(sys.executable, PLAN, *VIT_B, *flags)
    assert done.returncode == 2
    assert words in done.stderr


def test_the_data_must_deliver_what_the_gpus_train_on(tiny: Callable[..., PretrainRecipe]) -> None:
    recipe = tiny(data={"repeats": 2}, train={"total_batch": 48})
    needed = supply(
        recipe, 1000.0, num_videos=100, stored_bytes=10**6, rate_per_core=50.0, cores=19
    )
    assert needed.decode_cores == 20
    assert not needed.suffices
    # 500 videos a second, of 10 kB each.
    assert needed.read_bytes_per_s == 5e6


def test_longer_clips_take_longer_to_decode(tiny: Callable[..., PretrainRecipe]) -> None:
    short, long = (assumed_rate(tiny(data={"frames": frames}), 1) for frames in (4, 8))
    assert short == 2 * long


def test_clips_on_the_layer_need_fewer_cores(tiny: Callable[..., PretrainRecipe]) -> None:
    recipe = tiny(data={"stride": 4})
    assert assumed_rate(recipe, 4) == assumed_rate(recipe, 2) > 1.5 * assumed_rate(recipe, 1)
    assert assumed_rate(recipe, 3) == assumed_rate(recipe, 1)
    uniform = tiny(data={"stride": 4, "sampling": "uniform"})
    assert assumed_rate(uniform, 4) == assumed_rate(recipe, 1)


@pytest.mark.parametrize(
    ("stride", "sampling", "words"),
    [(3, "dense", "not a multiple"), (4, "uniform", "others too")],
)
def test_the_plan_says_where_clips_decode_more_than_they_need(
    tiny: Callable[..., PretrainRecipe], stride: int, sampling: str, words: str
) -> None:
    recipe = tiny(data={"stride": stride, "sampling": sampling})
    (note,) = layers_in_words(recipe.data, 4)
    assert "one frame in 4" in note and words in note
    assert layers_in_words(recipe.data, 1) == []
    assert layers_in_words(tiny(data={"stride": 4}).data, 4) == []


def test_the_plan_of_clips_at_a_rate_assumes_no_layer(tiny: Callable[..., PretrainRecipe]) -> None:
    recipe = tiny(data={"stride": None, "fps": 7.5})
    assert "with data.fps it depends" in layers_in_words(recipe.data, 4)[0]
    assert assumed_rate(recipe, 4) == assumed_rate(recipe, 1)
    assert supply(
        recipe, 100, num_videos=9, stored_bytes=None, rate_per_core=None, cores=None
    ).rate_per_core == assumed_rate(recipe, 1)
