"""Real runs of scripts/finetune.py: they learn, resume exactly, and refuse what does not fit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from arvideo_ds.config import FinetuneRecipe, load_recipe
from arvideo_ds.engine.checkpoints import export_weights
from arvideo_ds.errors import UserError
from arvideo_ds.evaluation.pretrained import load_classifier
from arvideo_ds.models.encoder import build_encoder
from arvideo_ds.runs.run_folder import read_recipe
from arvideo_ds.train.settle import RunOptions, RunSettings, settle
from tests import warm_start
from tests.conftest import ROOT, command_environment, run_script

Run = Callable[..., subprocess.CompletedProcess[str]]
SCRIPT = ROOT / "scripts" / "finetune.py"


def command(shards: Path, output: Path, *overrides: str) -> list[str]:
    return [
        str(SCRIPT),
        "--recipe=finetune_demo",
        f"--output={output}",
        f"data.shards={shards / 'train'}",
        f"evaluation.shards={shards / 'test'}",
        "data.num_streams=12",
        "data.workers=1",
        "train.total_batch=16",
        "train.micro_batch=16",
        "train.log_every=1",
        *overrides,
    ]


def kill_at_step_5(arguments: list[str]) -> None:
    process = warm_start.start(arguments, cwd=ROOT, env=command_environment())
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 5/"):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# 2 epochs of 48 videos, everything that draws switched on.
DRAWS = (
    "train.epochs=2",
    "train.save_every=2",
    "finetune.ema_decay=0.9",
    "finetune.mixup=0.8",
    "finetune.cutmix=1.0",
    "finetune.drop_path=0.1",
    "data.randaugment=rand-m7-n4-mstd0.5-inc1",
    "data.erase=0.25",
)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights_average_and_best(
    demo_shards: Path, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = run_script(*command(demo_shards, whole, *DRAWS))
    assert done.returncode == 0, done.stderr[-3000:]
    kill_at_step_5(command(demo_shards, cut, *DRAWS))
    again = run_script(*command(demo_shards, cut, *DRAWS))
    assert again.returncode == 0, again.stderr[-3000:]
    assert "going on after step" in again.stdout
    for name in ("model", "ema", "best"):
        first, second = (load_file(folder / f"{name}.safetensors") for folder in (whole, cut))
        assert all(torch.equal(first[key], second[key]) for key in first), name
    assert not torch.equal(
        load_file(whole / "ema.safetensors")["head.weight"],
        load_file(whole / "model.safetensors")["head.weight"],
    )
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (whole, cut)]
    curves = [[json.loads(line)["loss/finetune"] for line in file] for file in lines]
    assert curves[0] == curves[1]


@pytest.mark.slow
def test_the_best_weights_are_those_of_the_best_validation(
    demo_shards: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    options = ("train.epochs=3", "evaluation.every_epochs=1", "train.keep_checkpoints=9")
    done = run_script(*command(demo_shards, folder, *options))
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    judged = {m["step"]: m["validation/top1"] for m in metrics if "validation/top1" in m}
    assert list(judged) == [3, 6, 9]
    best = json.loads((folder / "best.json").read_text())
    assert best["top1"] == max(judged.values())
    assert best["step"] == max(judged, key=lambda step: (judged[step], -step))
    checkpoint = folder / "checkpoints" / f"step-{best['step']:08d}"
    export_weights(checkpoint, tmp_path / "expected.safetensors", prefix="model.")
    expected, kept = (
        load_file(tmp_path / "expected.safetensors"),
        load_file(folder / "best.safetensors"),
    )
    assert all(torch.equal(expected[key], kept[key]) for key in expected)
    assert json.loads((folder / "labels.json").read_text())[0]
    assert json.loads((folder / "summary.json").read_text())["best"] == best


def encoder_file(folder: Path, *overrides: str) -> Path:
    recipe = load_recipe("finetune_demo", overrides, FinetuneRecipe)
    torch.manual_seed(5)
    state = build_encoder(recipe.encoder).state_dict()
    save_file({f"encoder.{key}": value for key, value in state.items()}, folder / "e.safetensors")
    return folder / "e.safetensors"


@pytest.mark.slow
def test_it_begins_with_the_given_encoder_and_only_at_the_start(
    demo_shards: Path, tmp_path: Path
) -> None:
    path, folder = encoder_file(tmp_path), tmp_path / "run"
    options = ("train.max_steps=2", "optim.base_lr=1e-30", f"--init-from={path}")
    done = run_script(*command(demo_shards, folder, *options))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "50 of 50 tensors" in done.stdout
    given, trained = load_file(path), load_file(folder / "model.safetensors")
    for key in given:
        if key in trained:
            torch.testing.assert_close(trained[key], given[key], rtol=0, atol=1e-4)
    # The finished run needs the file no more.
    path.unlink()
    assert "nothing left to do" in run_script(*command(demo_shards, folder, *options)).stdout


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["finetune.num_classes=7"], "finetune.num_classes=7"),
        (["evaluation.shards=nowhere"], "evaluation.shards=nowhere"),
        (["finetune.mixup=1", "train.micro_batch=1"], "in pairs"),
        (["finetune.heads=[verb,noun]", "finetune.num_classes=null"], "have one label each"),
        (["finetune.heads=[verb,noun]"], "remove finetune.num_classes"),
        (["finetune.heads=[verb,verb]", "finetune.num_classes=null"], "each label set once"),
        (["finetune.heads=verb"], "must be a list of label sets, such as [verb, noun]"),
        (["evaluation.batch=1", "evaluation.views=[2,3]"], "evaluation.batch=1"),
        (["finetune.layer_decai=1"], "finetune.layer_decay"),
        (["task=pretrain"], "is to pretrain; start it with `arvideo pretrain`"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_starts(
    overrides: list[str], words: str, demo_shards: Path
) -> None:
    with pytest.raises(UserError) as refused:
        settled(demo_shards, *overrides)
    assert words in str(refused.value)


def settled(shards: Path, *overrides: str) -> RunSettings[FinetuneRecipe]:
    where = (f"data.shards={shards / 'train'}", f"evaluation.shards={shards / 'test'}")
    options = RunOptions("finetune_demo", ROOT / "ds_configs/zero1.json", [*where, *overrides])
    return settle(options, FinetuneRecipe, world_size=1)


@pytest.mark.parametrize(
    ("split", "labels", "words"),
    [("train", None, "has no labels"), ("test", ["x", "y"], "different labels")],
)
def test_shards_without_labels_or_with_others_are_refused(
    split: str, labels: list[str] | None, words: str, demo_shards: Path, tmp_path: Path
) -> None:
    shards = shutil.copytree(demo_shards, tmp_path / "shards")
    path = shards / split / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"labels": labels}))
    with pytest.raises(UserError, match=words):
        settled(shards)


@pytest.mark.slow
def test_adapters_resume_exactly_and_leave_the_encoder_as_it_was(
    demo_shards: Path, tmp_path: Path
) -> None:
    """In bf16, whose weights are rounded; the resumed run has the initial weights no more."""
    whole, cut, path = tmp_path / "whole", tmp_path / "cut", encoder_file(tmp_path)
    options = (*DRAWS, "finetune.train=lora", "finetune.lora_dropout=0.1", "train.precision=bf16")
    options += ("train.grad_dtype=bf16", f"finetune.init_from={path}", "train.epochs=1")
    options += ("train.total_batch=8", "train.micro_batch=8")
    done = run_script(*command(demo_shards, whole, *options))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "25,864 (3.11%) trained" in done.stdout
    kill_at_step_5(command(demo_shards, cut, *options))
    given = {name: value for name, value in load_file(path).items() if ".norm." not in name}
    path.unlink()
    again = run_script(*command(demo_shards, cut, *options))
    assert again.returncode == 0, again.stderr[-3000:]
    assert "going on after step" in again.stdout
    for name in ("model", "ema", "best"):
        first, second = (load_file(folder / f"{name}.safetensors") for folder in (whole, cut))
        assert all(torch.equal(first[key], second[key]) for key in first), name
        changed = {key for key in given if not torch.equal(first[key], given[key])}
        # Merged: no other name, and no other weight of the encoder, has changed.
        assert changed == {key for key in given if key.endswith(("qkv.weight", "proj.weight"))}
        assert not any("lora" in key for key in first)
    recipe = read_recipe(whole, FinetuneRecipe)
    assert load_classifier(recipe, whole)[0].head.weight.shape == (8, 128)


@pytest.mark.slow
def test_weights_that_are_not_there_are_one_paragraph(demo_shards: Path, tmp_path: Path) -> None:
    done = run_script(*command(demo_shards, tmp_path / "run", "--init-from=nowhere"))
    assert done.returncode == 2, done.stdout[-2000:]
    assert "there is no nowhere" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_dry_run_says_what_it_would_do(run: Run) -> None:
    done = run(sys.executable, SCRIPT, "--recipe=finetune_vit_b_k400", "--dry_run")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)["plan"]
    assert plan["encoder_tokens"] == 1568
    assert plan["decoder_queries"] == 0
    assert 86e6 < plan["parameters_encoder"] < 88e6
    # 512 clips of 256 videos.
    assert plan["lr"] == pytest.approx(5e-4)
