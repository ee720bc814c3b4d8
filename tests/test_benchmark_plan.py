"""scripts/benchmark_plan.py on the CPU: the peak of a whole step against the adviser's."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
Run = Callable[..., subprocess.CompletedProcess[str]]
ROOT = Path(__file__).parent.parent
BENCHMARK = ROOT / "scripts" / "benchmark_plan.py"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_peak_of_a_step_is_what_the_adviser_says(
    stage: int, precision: str, run: Run, tmp_path: Path
) -> None:
    tree = json.loads((ROOT / "ds_configs" / f"zero{stage}.json").read_text())
    tree["zero_optimization"].update(reduce_bucket_size=100_000)
    small = tmp_path / "small.json"
    small.write_text(json.dumps(tree))
    done = run(
        sys.executable, BENCHMARK, "--recipes", "demo", "--deepspeed_config", small,
        "--micro_batch", "2", "--accumulation", "2", "--tolerance", "0.05",
        f"train.precision={precision}",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = json.loads(done.stdout)["results"]
    assert result["accumulation"] == 2


def test_the_peak_of_a_step_of_fine_tuning_is_what_the_adviser_says(run: Run) -> None:
    for options in (("finetune.pooling=mean",), ("finetune.pooling=attention",)):
        flags = ("--recipes", "finetune_demo", "--micro_batch", "16", "--tolerance", "0.05")
        done = run(sys.executable, BENCHMARK, *flags, "train.precision=fp32", *options)
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_wrong_prediction_is_an_error_of_the_command(run: Run) -> None:
    flags = ("--recipes", "demo", "--micro_batch", "2", "--tolerance", "0.00001")
    assert run(sys.executable, BENCHMARK, *flags).returncode == 1
