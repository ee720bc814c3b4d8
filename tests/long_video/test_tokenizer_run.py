"""scripts/train_tokenizer.py and evaluate_tokenizer.py for real, on a few of the demo's videos."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from arvideo_ds.long_video.tokenizer import load_tokenizer
from tests.conftest import ROOT, run_script
from tests.train.conftest import metrics_of

TRAIN, EVALUATE = (
    ROOT / "scripts" / "train_tokenizer.py",
    ROOT / "scripts" / "evaluate_tokenizer.py",
)
LOSS = "loss/tokenizer"


@pytest.fixture
def train(demo_shards: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    recipe = tmp_path / "small.yaml"
    recipe.write_text("base: tokenizer_demo\ntokenizer: {filters: 4, samples: 8}\n")

    def start(name: str, *arguments: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
        done = run_script(
            TRAIN,
            f"--recipe={recipe}",
            f"--output={tmp_path / name}",
            f"data.shards={demo_shards / 'train'}",
            f"evaluation.shards={demo_shards / 'test'}",
            "data.num_streams=12",
            "data.workers=1",
            "train.log_every=1",
            *arguments,
            ranks=ranks,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done

    return start


@pytest.mark.slow
def test_psnr_rises_and_the_run_is_judged_drawn_and_loaded(
    train: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = train("run", "train.max_steps=60", "evaluation.every_epochs=2.5", "data.flip=false")
    assert "dB, SSIM" in done.stdout
    judged = [m for m in metrics_of(tmp_path / "run") if "validation/psnr_db" in m]
    assert len(judged) >= 3
    assert judged[-1]["validation/psnr_db"] > judged[0]["validation/psnr_db"] + 0.3
    assert 0 < judged[-1]["validation/code_usage"] <= 1
    done = run_script(EVALUATE, tmp_path / "run", "--motion", "8")
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads((tmp_path / "run" / "tokenizer.json").read_text())
    assert said["weights"] == "ema" and said["videos"] == 48
    assert said["motion"]["trained"]["times_random"] > 1
    assert (tmp_path / "run" / "tokenizer.png").stat().st_size > 10_000
    scores, codes = load_tokenizer(tmp_path / "run").tokens(
        torch.zeros(1, 16, 32, 32, 3, dtype=torch.uint8)
    )
    assert scores.shape == codes.shape == (1, 8, 8, 8)


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_stopped(
    train: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    train("whole", "train.max_steps=6", "train.save_every=3")
    # The same run, its second half forgotten.
    train("parts", "train.max_steps=6", "train.save_every=3")
    for newest in sorted((tmp_path / "parts" / "checkpoints").glob("*6*")):
        newest.rename(tmp_path / f"away_{newest.name}")
    train("parts", "train.max_steps=6", "train.save_every=3")
    whole, parts = metrics_of(tmp_path / "whole"), metrics_of(tmp_path / "parts")
    assert [m["step"] for m in parts] == [1, 2, 3, 4, 5, 6]
    assert [m[LOSS] for m in parts] == [m[LOSS] for m in whole]


@pytest.mark.slow
@pytest.mark.dist
def test_two_ranks_and_recomputation_give_the_curve_of_one(
    train: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    train("one", "train.max_steps=4")
    json_file = f"--deepspeed_config={ROOT}/ds_configs/zero2_checkpointing.json"
    train("two", "train.max_steps=4", json_file, ranks=2)
    one, two = ([m[LOSS] for m in metrics_of(tmp_path / name)] for name in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-5)
    assert one[-1] < one[0]
