"""GPUs by name, and what the data must deliver for them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from arvideo_ds.config import PretrainRecipe
from arvideo_ds.planning.data import assumed_rate, supply
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
    assert "warning: 16 cores decode 880 clips/s" in named.stdout
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
    short, long = (assumed_rate(tiny(data={"frames": frames})) for frames in (4, 8))
    assert short == 2 * long
