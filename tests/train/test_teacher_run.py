"""Runs on the features of a teacher: its weights stay where they are, and the run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from arvideo_ds.engine.checkpoints import newest_checkpoint
from arvideo_ds.files.checksums import sha256_of
from arvideo_ds.files.tensors import load_tensors, save_tensors
from arvideo_ds.runs import run_folder
from tests.train.conftest import PRETRAIN, Runs

FINETUNE: dict[str, Any] = {"script": PRETRAIN.with_name("finetune.py"), "recipe": "finetune_demo"}


def saved_values(run: Path) -> int:
    """Number of values in a run's newest checkpoint."""
    checkpoint = newest_checkpoint(run / run_folder.CHECKPOINTS)
    assert checkpoint is not None
    parts = checkpoint.path.glob("rank-*.safetensors")
    return sum(value.numel() for part in parts for value in load_tensors(part).values())


@pytest.mark.slow
@pytest.mark.dist
def test_a_run_with_a_teacher_resumes_and_saves_none_of_its_weights(runs: Runs) -> None:
    """Two ranks at ZeRO-3, interrupted, against one rank at ZeRO-2, uninterrupted."""
    runs.run("teacher", "train.max_steps=1", "model.size=tiny")
    teacher = runs.folder / "teacher"
    weights, options = teacher / run_folder.MODEL, ["train.max_steps=4", "model.size=tiny"]
    options.append(f"objective.teacher={teacher}")
    before = sha256_of(weights)
    runs.run("whole", *options)
    cut = {"ranks": 2, "stage": "zero3"}
    runs.run("cut", *options, fault="interrupt:1:1:0", code=None, **cut)

    own = load_tensors(weights)
    save_tensors({name: value + 1 for name, value in own.items()}, weights)
    assert "trained with another teacher" in runs.run("cut", *options, code=None, **cut)
    save_tensors(own, weights)
    assert sha256_of(weights) == before
    out = runs.run("cut", *options, **cut)
    assert f"features of ViT-tiny {teacher}" in out
    assert sha256_of(weights) == before
    pairs = list(zip(runs.losses("cut"), runs.losses("whole"), strict=True))
    assert len(pairs) == 4
    assert max(abs(a - b) / b for a, b in pairs) <= 1e-4

    folder = runs.folder / "cut"
    facts = json.loads((folder / run_folder.FACTS).read_text())
    assert facts["teacher"] == {"origin": str(teacher), "sha256": before}
    assert 0 < runs.summary("cut")["baseline_loss"] < 1
    student = load_tensors(folder / run_folder.MODEL)
    shapes = {name: value.shape for name, value in student.items()}
    assert shapes.pop("decoder.head.weight") == (128, 96)
    assert shapes.pop("decoder.head.bias") == (128,)
    assert shapes.items() <= {name: value.shape for name, value in own.items()}.items()
    # Weights and AdamW's two moments, of the student alone.
    assert saved_values(folder) <= 3.1 * sum(value.numel() for value in student.values())


@pytest.mark.slow
@pytest.mark.dist
def test_a_run_with_an_ema_teacher_resumes_to_the_same_curve(runs: Runs) -> None:
    """The average is in the checkpoint, whole or in parts, and the teacher follows it again."""
    options = ["train.max_steps=4", "objective.teacher=ema", "objective.teacher_decay=0.5"]
    runs.run("ema", *options)
    cut = {"ranks": 2, "stage": "zero3"}
    runs.run("ema-cut", *options, fault="interrupt:1:1:0", code=None, **cut)
    runs.run("ema-cut", *options, **cut)
    pairs = list(zip(runs.losses("ema-cut"), runs.losses("ema"), strict=True))
    assert len(pairs) == 4
    assert max(abs(a - b) / b for a, b in pairs) <= 1e-4


@pytest.mark.slow
@pytest.mark.dist
def test_fine_tuning_on_a_teacher_s_scores_resumes_and_saves_none_of_its_weights(
    runs: Runs,
) -> None:
    """Two ranks at ZeRO-3, interrupted, against one rank at ZeRO-2, uninterrupted."""
    shared = "evaluation.shards=null"
    runs.run("scores", shared, "train.max_steps=1", "model.size=tiny", **FINETUNE)
    teacher = runs.folder / "scores" / run_folder.MODEL
    # The scores of one step hardly differ: those of a random head do.
    head = {"head.weight": torch.randn(8, 128, generator=torch.Generator().manual_seed(0))}
    save_tensors(load_tensors(teacher) | head, teacher)
    before = sha256_of(teacher)
    options = [shared, "train.max_steps=4", "model.size=nano", f"finetune.teacher={teacher}"]
    runs.run("taught", *options, **FINETUNE)
    cut = {"ranks": 2, "stage": "zero3", **FINETUNE}
    runs.run("taught-cut", *options, fault="interrupt:1:1:0", code=None, **cut)
    out = runs.run("taught-cut", *options, **cut)
    assert f"scores of ViT-tiny {teacher}" in out and "going on after step" in out
    assert sha256_of(teacher) == before
    curves = [[m["loss/finetune"] for m in runs.metrics(n)] for n in ("taught-cut", "taught")]
    pairs = list(zip(*curves, strict=True))
    assert len(pairs) == 4
    assert max(abs(a - b) / b for a, b in pairs) <= 1e-4
    folder = runs.folder / "taught-cut"
    facts = json.loads((folder / run_folder.FACTS).read_text())
    assert facts["teacher"] == {"origin": str(teacher), "sha256": before}
    student = sum(value.numel() for value in load_tensors(folder / run_folder.MODEL).values())
    assert saved_values(folder) <= 3.1 * student
