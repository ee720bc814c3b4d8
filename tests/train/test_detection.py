"""scripts/detect.py and evaluate_detection.py for real: a tiny detector learns a tiny AVA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from arvideo_ds.config import DetectRecipe, load_recipe
from arvideo_ds.evaluation.detection import DetectionEvaluator
from arvideo_ds.shards.manifest import ShardSet
from arvideo_ds.tasks.detect import Detect
from tests.ava_set import AvaSet, make_ava
from tests.conftest import ROOT, run_script
from tests.train.conftest import metrics_of

DETECT, EVALUATE = ROOT / "scripts" / "detect.py", ROOT / "scripts" / "evaluate_detection.py"


def write_recipe(folder: Path, train: AvaSet, test: AvaSet, **overrides: Any) -> Path:
    def files(own: AvaSet) -> dict[str, str]:
        return {"annotations": str(own.annotations), "detections": str(own.detections)}

    tree = {
        "task": "detect",
        "model": {"size": "nano", "positions": "sincos_3d"},
        "data": {
            "shards": str(train.shards),
            "frames": 8,
            "size": 32,
            "stride": 1,
            "crop_scales": [1.0, 0.875],
            "num_streams": 4,
            "workers": 1,
        },
        "optim": {"base_lr": 2e-2, "warmup_steps": 10, "betas": [0.9, 0.999]},
        "train": {"total_batch": 16, "micro_batch": 16, "precision": "fp32", **overrides},
        "detect": {"num_actions": 3, "drop_path": 0.0, **files(train)},
        "evaluation": {
            "shards": str(test.shards),
            "action_list": str(test.action_list),
            "every_epochs": 100,
            "views": 2,
            **files(test),
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.slow
def test_it_learns_and_frame_map_rises(tmp_path: Path) -> None:
    train = make_ava(tmp_path, "train", seconds=62)
    test = make_ava(tmp_path, "val", seconds=22, seed=1)
    path = write_recipe(tmp_path, train, test, max_steps=150, log_every=15)
    recipe = load_recipe(str(path), (), DetectRecipe)
    evaluator = DetectionEvaluator(ShardSet(test.shards), recipe)
    torch.manual_seed(0)
    untrained = Detect(recipe).eval()
    with torch.inference_mode():
        found = evaluator.detect(untrained, num_workers=0, device=torch.device("cpu"))
    before = evaluator.report(found).mean
    start = (DETECT, f"--recipe={path}", f"--output={tmp_path / 'run'}")
    done = run_script(*start, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "validation mAP" in done.stdout
    done = run_script(EVALUATE, tmp_path / "run", "--csv", tmp_path / "found.csv")
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads((tmp_path / "run" / "detection.json").read_text())
    assert before < 0.9  # half of the squares have each action
    assert said["map"] > 90
    # Colours are learnt in a few steps; whether the square moves down shows in no single frame.
    assert said["average_precision"]["down"] > 70
    assert said["map"] == pytest.approx(metrics_of(tmp_path / "run")[-1]["validation/map"], abs=0.1)
    assert said["notes"] == []
    assert (tmp_path / "run" / "detections.png").stat().st_size > 10_000
    assert len((tmp_path / "found.csv").read_text().splitlines()) == 3 * said["boxes"]


@pytest.mark.dist
def test_two_ranks_train_and_judge_as_one(tmp_path: Path, ava: AvaSet) -> None:
    path = write_recipe(tmp_path, ava, ava, max_steps=5, log_every=1)
    start = [str(DETECT), f"--recipe={path}", f"--deepspeed_config={ROOT}/ds_configs/zero2.json"]
    curves = []
    for ranks, name in enumerate(("one", "two"), 1):
        done = run_script(*start, f"--output={tmp_path / name}", cwd=tmp_path, ranks=ranks)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        curves.append(metrics_of(tmp_path / name))
    one, two = curves
    losses = [[m["loss/detect"] for m in curve] for curve in curves]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert one[-1]["validation/keyframes"] == two[-1]["validation/keyframes"] == 16
    assert one[-1]["validation/map"] == pytest.approx(two[-1]["validation/map"], abs=2)
