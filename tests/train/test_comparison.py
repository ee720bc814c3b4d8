"""scripts/compare_finetuning.py: both starts with every seed in one table, nothing done twice."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file

from arvideo_ds.config import FinetuneRecipe, load_recipe
from arvideo_ds.models.encoder import build_encoder
from tests.conftest import ROOT

Run = Callable[..., subprocess.CompletedProcess[str]]
SCRIPT = ROOT / "scripts" / "compare_finetuning.py"


@pytest.mark.slow
def test_both_starts_are_trained_tested_and_set_side_by_side(
    demo_shards: Path, tmp_path: Path, run: Run
) -> None:
    source, output = tmp_path / "source.safetensors", tmp_path / "compared"
    encoder = build_encoder(load_recipe("finetune_demo", [], FinetuneRecipe).encoder)
    save_file({f"encoder.{name}": value for name, value in encoder.state_dict().items()}, source)
    command = [
        sys.executable,
        SCRIPT,
        "--recipe=finetune_demo",
        f"--init-from={source}",
        "--seeds=2",
        "--jobs=2",
        f"--output={output}",
        f"data.shards={demo_shards / 'train'}",
        f"evaluation.shards={demo_shards / 'test'}",
        "data.num_streams=12",
        "data.workers=0",
        "train.total_batch=8",
        "train.micro_batch=8",
        "train.max_steps=2",
        "optim.warmup_steps=1",
    ]
    done = run(*command)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((output / "comparison.json").read_text())["starts"]
    assert list(found) == ["pretrained", "scratch"]
    for start, row in found.items():
        tested = [
            json.loads(path.read_text())["top1"]
            for seed in range(2)
            for path in (output / f"{start}-{seed}" / "evaluation").glob("*-last-*.json")
        ]
        assert row["top1"] == tested
        assert row["mean"] == pytest.approx(sum(tested) / 2)
        assert (output / f"confusion-{start}.png").stat().st_size > 1000
        assert f"| {start} |" in done.stdout
    assert "source.safetensors" in (output / "pretrained-1" / "recipe.yaml").read_text()
    assert "source.safetensors" not in (output / "scratch-1" / "recipe.yaml").read_text()

    again = run(*command)
    assert again.returncode == 0 and again.stdout.count("nothing left to do") == 4
    assert json.loads((output / "comparison.json").read_text())["starts"] == found

    wrong = run(*command, "train.total_batch=12")
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr
