"""scripts/ablate.py for real: interrupted, gone on with, a broken row, wrong input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file

from arvideo_ds.config import FinetuneRecipe, load_recipe
from arvideo_ds.models.encoder import build_encoder

ROOT = Path(__file__).parent.parent.parent
ABLATE = ROOT / "scripts" / "ablate.py"
Run = Callable[..., subprocess.CompletedProcess[str]]

GRID = """
title: Two rows and a broken one
base: demo
overrides: [train.total_batch=8, train.micro_batch=8, data.num_streams=4, data.workers=0,
            optim.warmup_steps=1, train.log_every=1, train.max_steps=12]
probe_videos: [32, 16]
ablations:
  - name: cluster
    title: Cluster shape
    rows:
      - {name: 1x8x8, overrides: ["objective.cluster=[1,8,8]"], paper: 66.0}
      - {name: 2x4x4, paper: 66.8}
      - {name: broken, overrides: [train.precision=fp16]}
  - name: order
    title: Order
    rows: [{name: random}]
"""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    grid = tmp_path / "grid.yaml"
    grid.write_text(GRID)
    words = [sys.executable, ABLATE, grid, "--seeds=1", f"--output={tmp_path / 'out'}"]
    return [str(word) for word in words]


@pytest.mark.slow
def test_a_grid_goes_on_where_it_was_interrupted_and_tells_what_failed(
    command: list[str],
    demo_shards: Path,
    tmp_path: Path,
    run: Run,
    environment: Callable[..., dict[str, str]],
) -> None:
    command += [f"--train={demo_shards / 'train'}", f"--test={demo_shards / 'test'}"]
    cells = tmp_path / "out" / "cells"
    metrics = cells / "cluster_1x8x8-seed0" / "metrics.jsonl"
    first = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    )
    limit = time.monotonic() + 120
    while not (metrics.is_file() and metrics.read_text()):
        assert first.poll() is None, first.communicate()
        assert time.monotonic() < limit
        time.sleep(0.05)
    # Not SIGINT: a shell lets what it starts in the background ignore that one.
    os.kill(first.pid, signal.SIGTERM)
    said, _ = first.communicate(timeout=60)
    assert first.returncode == 75, said
    assert "the same command resumes" in said
    saved = len(metrics.read_text().splitlines())
    assert 0 < saved < 12
    finished = {path: path.stat().st_mtime_ns for path in cells.glob("*/result.json")}
    assert set(finished) == {cells / "untrained-seed0" / "result.json"}

    second = run(*command, "--jobs=2", timeout=200)
    assert second.returncode == 1, second.stdout + second.stderr
    log = (metrics.parent / "log.txt").read_text()
    assert f"going on after step {saved}" in log
    assert all(path.stat().st_mtime_ns == then for path, then in finished.items())
    document = json.loads((tmp_path / "out" / "table.json").read_text())
    assert (document["cells"], document["finished"]) == (4, 3)
    assert list(document["failed"]) == ["cluster_broken-seed0"]
    assert "DeepSpeed has no fp16 on a CPU" in document["failed"]["cluster_broken-seed0"]
    rows = {row["name"]: row for row in document["ablations"][0]["rows"]}
    assert len(rows["1x8x8"]["linear"]["seeds"]) == len(rows["2x4x4"]["knn"]["seeds"]) == 1
    assert rows["2x4x4"]["seconds_per_step"] > 0
    assert rows["broken"]["linear"]["mean"] is None
    # Equal to 2x4x4, so never run on its own.
    assert document["ablations"][1]["rows"][0]["linear"] == rows["2x4x4"]["linear"]
    assert {path.suffix for path in (tmp_path / "out").glob("table.*")} == {
        ".md", ".json", ".png", ".html",
    }  # fmt: skip

    other = run(*command, "optim.base_lr=1e-3")
    assert other.returncode == 2
    assert "contains a run with other settings (optim.base_lr was 0.016, is 0.001)" in other.stderr


@pytest.mark.slow
def test_fine_tuning_from_pretrained_weights_is_set_beside_scratch(
    epic_shards: Path, tmp_path: Path, run: Run
) -> None:
    """Two folds and label sets: every run is trained, tested and in the table; none is repeated."""
    output, folds = tmp_path / "compared", (("train", "test"), ("test", "train"))
    encoder = build_encoder(load_recipe("finetune_demo", [], FinetuneRecipe).encoder)
    state = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    for fold in range(2):
        save_file(state, tmp_path / f"source{fold}.safetensors")
    command = [
        sys.executable, ABLATE, "finetuning", "--base=finetune_demo",
        f"finetune.init_from={tmp_path}/source{{fold}}.safetensors", "--seeds=1", "--jobs=2",
        f"--output={output}",
        *(f"--{option}={epic_shards / name}"
          for fold in folds for option, name in zip(("train", "test"), fold, strict=True)),
        "finetune.heads=[verb,noun]", "finetune.num_classes=null", "data.sampling=uniform",
        "data.num_streams=12", "data.workers=0", "train.total_batch=8", "train.micro_batch=8",
        "train.max_steps=2", "optim.warmup_steps=1",
    ]  # fmt: skip
    done = run(*command)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    document = json.loads((output / "table.json").read_text())
    (ablation,) = document["ablations"]
    assert [row["name"] for row in ablation["rows"]] == ["pretrained", "scratch"]
    assert list(document["measures"]) == ["top1", "verb_top1", "noun_top1"]
    for row in ablation["rows"]:
        cells = [output / "cells" / f"{row['variant']}-fold{fold}-seed0" for fold in range(2)]
        tested = [
            json.loads(path.read_text())
            for cell in cells
            for path in (cell / "evaluation").glob("*-last-*.json")
        ]
        assert row["top1"]["seeds"] == pytest.approx([one["top1"] for one in tested], abs=0.01)
        nouns = [one["label_sets"]["noun"]["top1"] for one in tested]
        assert row["noun_top1"]["seeds"] == pytest.approx(nouns, abs=0.01)
        for fold, cell in enumerate(cells):
            recipe = (cell / "recipe.yaml").read_text()
            assert (f"source{fold}.safetensors" in recipe) == (row["name"] == "pretrained")
            assert f"shards: {epic_shards / folds[fold][0]}" in recipe
            assert f"shards: {epic_shards / folds[fold][1]}" in recipe
            assert len(list((cell / "evaluation").glob("*-last-*-noun.png"))) == 1
    again = run(*command)
    assert again.returncode == 0 and "4 cells, 0 to run" in again.stdout
    assert json.loads((output / "table.json").read_text()) == document
    wrong = run(*command, "train.total_batch=12")
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--seeds=0"], "--seeds 0 must be 1 or more"),
        (["--jobs=0"], "--jobs 0 must be 1 or more"),
        (["train.steps=3"], "the base: recipe demo.yaml with overrides: unknown key 'train.steps'"),
        (["--train=nowhere", "--test=nowhere"], "nowhere"),
        (["--train=a", "--train=b", "--test=c"], "--train is given 2 times and --test 1 times"),
    ],
)
def test_wrong_input_is_one_paragraph(
    command: list[str], more: list[str], words: str, run: Run
) -> None:
    done = run(*command, *more)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1
