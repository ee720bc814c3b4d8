"""The CUDA path on an imaginary GPU: launches, waits, placement and memory; no values, no times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, free_port
from tests.fakecuda.build import environment, unavailable

HERE = Path(__file__).parent
VIT_B = "pretrain_vit_b_k400"
EAGER = "train.compile=false"
# At most so many in a whole engine step (forward, backward, update).
KERNELS_OF_STEP, WAITS = 150, 2

pytestmark = [
    pytest.mark.fakecuda,
    pytest.mark.skipif(unavailable() is not None, reason=f"fakecuda: {unavailable()}"),
]


def run(program: str, *arguments: str | Path, timeout: float = 900) -> list[Any]:
    """What the program prints after RESULT, line by line."""
    done = subprocess.run(
        [sys.executable, str(HERE / program), *map(str, arguments)],
        env={
            **os.environ,
            **environment(),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "MASTER_PORT": str(free_port()),
        },
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return [json.loads(line.removeprefix("RESULT ")) for line in lines]


def run_cases(program: str, cases: list[dict[str, Any]], folder: Path) -> list[Any]:
    path = folder / "cases.json"
    path.write_text(json.dumps(cases))
    results = run(program, path)
    assert len(results) == len(cases)
    return results


def test_a_step_launches_few_kernels_and_waits_once(tmp_path: Path) -> None:
    plain: dict[str, Any] = {"recipe": [VIT_B, EAGER], "micro_batch": 64}
    cases = [
        {**plain, "stage": 0},
        {**plain, "stage": 1},
        {**plain, "stage": 2},
        {**plain, "stage": 3},
        {**plain, "stage": 2, "micro_batch": 32, "accumulation": 2, "average": True},
        {**plain, "stage": 0, "recipe": [VIT_B, EAGER, "train.precision=fp32"]},
    ]
    seen = run_cases("steps.py", cases, tmp_path)
    for case, parts in zip(cases, seen, strict=True):
        print(json.dumps({**case, **parts}))
        waits = sum(parts[part]["waits"] for part in ("forward", "backward", "step"))
        assert parts["step"]["kernels"] <= KERNELS_OF_STEP, case
        # ZeRO-3 gathers weights, and waits for some.
        assert waits <= (2 * WAITS + 1 if case["stage"] == 3 else WAITS), case


@pytest.mark.slow
def test_a_compiled_model_is_one_graph_of_fewer_kernels(tmp_path: Path) -> None:
    small = ["model.size=tiny", "model.patch=[2,16,16]", "data.frames=8", "data.size=112"]
    recipes = {
        VIT_B: (*small, "objective.cluster=[1,7,7]", "decoder.depth=1"),
        "finetune_vit_b_k400": small,
    }
    cases = [
        {"recipe": [name, *settings, *how], "micro_batch": 8, "stage": 1}
        for name, settings in recipes.items()
        for how in ((), (EAGER,))
    ]
    seen = run_cases("steps.py", cases, tmp_path)
    for compiled, eager in zip(seen[::2], seen[1::2], strict=True):
        print(json.dumps([compiled, eager]))
        assert compiled["graphs"] == [1, 1, 1]  # in the first step, and no other later
        assert compiled["graph_breaks"] == 0
        assert eager["graphs"] == [0, 0, 0]
        assert compiled["forward"]["kernels"] < eager["forward"]["kernels"]
    masked, free = ({**seen[number]["attention"]} for number in (0, 2))
    assert set(masked.values()) == {"efficient_attention"}
    assert set(free.values()) == {"flash_attention"}


def test_no_task_mixes_devices_or_waits() -> None:
    results = run("tasks.py")
    assert len(results) == 22
    assert [case for case in results if case["failed"]] == []


def train(stage: int, steps: int, folder: Path, shards: Path, *arguments: str | Path) -> int:
    """Train the demo's model in bf16; returns how often the host waited."""
    (result,) = run(
        "loop.py",
        *("--recipe", "demo", "--deepspeed_config", ROOT / "ds_configs" / f"zero{stage}.json"),
        *("--output", folder, *arguments, f"data.shards={shards}", "train.precision=bf16"),
        *(f"train.max_steps={steps}", "train.log_every=100", "train.save_every=100"),
        *("probe.every_epochs=null", EAGER),
    )
    assert result["code"] == 0
    return sum(result["waits"].values())


def test_a_run_waits_once_a_step_and_continues_at_another_stage(
    demo_shards: Path, tmp_path: Path
) -> None:
    shards = demo_shards / "train"
    short, long = (train(2, steps, tmp_path / f"{steps}", shards) for steps in (4, 8))
    assert long - short <= WAITS * (8 - 4)
    print(f"{(long - short) / (8 - 4)} waits in a step")
    train(3, 6, tmp_path / "zero3", shards, "--resume", tmp_path / "4")


def zero(stage: int, **keys: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage}, **keys}


def test_memory_is_what_the_planner_says(tmp_path: Path) -> None:
    fp32 = "train.precision=fp32"
    cases = {
        "ZeRO-1": {"deepspeed": zero(1), "micro_batch": 64, "recipe": [VIT_B]},
        "ZeRO-2": {"deepspeed": zero(2), "micro_batch": 64, "recipe": [VIT_B]},
        "ZeRO-3": {"deepspeed": zero(3), "micro_batch": 64, "recipe": [VIT_B]},
        "accumulated": {
            "deepspeed": zero(2),
            "micro_batch": 32,
            "accumulation": 2,
            "recipe": [VIT_B],
        },
        "fp32": {"deepspeed": zero(0), "micro_batch": 16, "recipe": [VIT_B, fp32]},
        "recomputed": {
            "deepspeed": zero(1, activation_checkpointing={}),
            "micro_batch": 64,
            "recipe": [VIT_B],
        },
        "bf16 gradients": {
            "deepspeed": zero(1),
            "micro_batch": 32,
            "accumulation": 2,
            "recipe": [VIT_B, "train.grad_dtype=bf16"],
        },
        "ViT-L": {
            "deepspeed": zero(1, activation_checkpointing={}),
            "micro_batch": 64,
            "recipe": ["pretrain_vit_l_k400"],
        },
        "VideoMAE": {"deepspeed": zero(1), "micro_batch": 64, "recipe": ["videomae_vit_b_k400"]},
        "teacher": {
            "deepspeed": zero(1),
            "micro_batch": 64,
            "recipe": [VIT_B, "objective.teacher=ema", "objective.teacher_size=B"],
        },
        "fine-tuning": {
            "deepspeed": zero(1),
            "micro_batch": 8,
            "recipe": ["finetune_vit_b_k400"],
        },
    }
    ratios = dict(zip(cases, run_cases("memory.py", list(cases.values()), tmp_path), strict=True))
    print(json.dumps(ratios, indent=1))
    assert {name: ratio for name, ratio in ratios.items() if abs(ratio - 1) > 0.05} == {}
