"""The peak of a whole step on the CPU against the adviser's prediction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from arvideo_ds.arguments import deepspeed_configs
from tests.conftest import run_script


def zero(stage: int) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(deepspeed_configs()[f"zero{stage}"].read_text())
    tree["zero_optimization"].update(reduce_bucket_size=100_000)
    return tree


def finetuning(*overrides: str) -> dict[str, Any]:
    recipe = ["finetune_demo", "train.precision=fp32", *overrides]
    return {"deepspeed": zero(0), "micro_batch": 16, "recipe": recipe}


CASES = {
    **{
        f"stage {stage}, {precision}": {
            "deepspeed": zero(stage),
            "micro_batch": 2,
            "accumulation": 2,
            "recipe": ["demo", f"train.precision={precision}"],
        }
        for stage in range(4)
        for precision in ("fp32", "bf16")
    },
    "fine-tuning, mean": finetuning("finetune.pooling=mean"),
    "fine-tuning, attention": finetuning("finetune.pooling=attention"),
}


@pytest.mark.slow
def test_the_peak_of_a_step_is_what_the_adviser_predicts(tmp_path: Path) -> None:
    path = tmp_path / "cases.json"
    path.write_text(json.dumps(list(CASES.values())))
    done = run_script(Path(__file__).with_name("measure_peak.py"), path)
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [text for text in done.stdout.splitlines() if text.startswith("ratios ")]
    ratios = dict(zip(CASES, json.loads(line.removeprefix("ratios ")), strict=True))
    assert {name: ratio for name, ratio in ratios.items() if abs(ratio - 1) > 0.05} == {}
