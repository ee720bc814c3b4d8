"""scripts/plan.py as people meet it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]
ROOT = Path(__file__).parent.parent.parent
PLAN = ROOT / "scripts" / "plan.py"
MACHINE = ("--gpus", "64", "--gpu_memory_gib", "80")


def test_the_table_names_a_json_a_batch_and_the_time(run: Run) -> None:
    sixteen = ("--gpus", "16", "--gpu_memory_gib", "80")
    done = run(sys.executable, PLAN, "--recipe", "pretrain_vit_g_k400", *sixteen)
    assert done.returncode == 0, done.stderr
    assert "recommended: ZeRO-1, train.micro_batch=64" in done.stdout
    assert "ds_configs/zero1.json" in done.stdout
    assert "zero2.json sends 5.7 times as much per step and is slower" in done.stdout
    assert "assumed; give --tflops" in done.stdout
    assert "data.num_streams=15360" in done.stdout  # 1,024 GPUs
    assert "with phases" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) < 200


def test_json_is_one_document_with_the_same_numbers(run: Run) -> None:
    flags = ("--tflops", "200", "--bandwidth-gb-s", "50", "--json", "train.total_batch=512")
    done = run(sys.executable, PLAN, "--recipe", "pretrain_vit_b_k400", *MACHINE, *flags)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    best = said["recommended"]
    assert best in said["options"]
    assert best["clips_per_s"] == pytest.approx(512 / best["step_s"])
    assert best["train_s"] == pytest.approx(best["step_s"] * said["plan"]["steps"])
    assert said["given"]["strategy"]["stage"] == 2
    (row,) = [row for row in said["scaling"] if row["num_gpus"] == 64]
    assert row["option"] == best
    assert not any("assumed" in line for line in said["assumptions"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpus", "0", "--gpu_memory_gib", "80"), "--gpus 0 must be above 0"),
        (("--gpus", "8", "--gpu_memory_gib", "-1"), "--gpu_memory_gib -1"),
        (("--gpus", "7", "--gpu_memory_gib", "80"), "cannot share data.num_streams=960"),
        ((*MACHINE, "--deepspeed_config", "no.json"), "cannot read --deepspeed_config"),
        ((*MACHINE, "model.size=XXL"), "model.size"),
    ],
)
def test_wrong_input_ends_in_one_paragraph(
    arguments: tuple[str, ...], message: str, run: Run
) -> None:
    done = run(sys.executable, PLAN, "--recipe", "pretrain_vit_b_k400", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_where_nothing_fits_it_says_so(run: Run) -> None:
    little = ("--gpus", "1", "--gpu_memory_gib", "1")
    done = run(sys.executable, PLAN, "--recipe", "pretrain_vit_g_k400", *little)
    assert done.returncode == 0, done.stderr
    assert "nothing fits" in done.stdout


def test_advice_is_given_without_torch(run: Run) -> None:
    code = "import runpy, sys; runpy.run_path('scripts/plan.py'); print('torch' in sys.modules)"
    assert run(sys.executable, "-c", code).stdout.split() == ["False"]


@pytest.mark.parametrize(
    "recipe", ["finetune_vit_b_k400", "finetune_vit_b_epic_128f", "detect_vit_b_ava"]
)
def test_recipes_on_labels_are_planned_too(recipe: str, run: Run) -> None:
    done = run(sys.executable, PLAN, "--recipe", recipe, "--json", "--gpus", "8", *MACHINE[2:])
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    best = said["recommended"]
    assert best["fits"] and best["train_s"] > 0
    assert best["micro_batch"] % 2 == 0 or not recipe.startswith("finetune")


def test_a_tokenizer_is_refused_with_what_is_not_modelled(run: Run) -> None:
    done = run(sys.executable, PLAN, "--recipe", "tokenizer_b_k600", *MACHINE)
    assert done.returncode == 2 and done.stdout == ""
    assert "convolutions" in done.stderr and "arvideo tokenizer --dry_run" in done.stderr
