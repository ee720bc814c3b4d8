"""Real runs of scripts/pretrain.py: real DeepSpeed, real processes, real signals, on the CPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from arvideo_ds.engine.world import emulates_bf16
from tests.conftest import ROOT, free_port
from tests.train.conftest import Runs, stop

pytestmark = pytest.mark.dist
INTERRUPTED = 75


def largest_difference(left: list[float], right: list[float]) -> float:
    assert len(left) == len(right) > 0
    return max(abs(a - b) / abs(b) for a, b in zip(left, right, strict=True))


@pytest.fixture(scope="module")
def plain(runs: Runs) -> list[float]:
    """Loss curve of one process: what every other way of running must reproduce."""
    runs.run("plain", "train.max_steps=10")
    return runs.losses("plain")


@pytest.mark.parametrize("stage", ["zero0", "zero3"])  # the others: engine/test_matrix.py
def test_zero_stages_on_two_ranks_give_the_curve_of_one_process(
    runs: Runs, plain: list[float], stage: str
) -> None:
    runs.run(stage, "train.max_steps=10", ranks=2, stage=stage)
    assert largest_difference(runs.losses(stage), plain) <= 1e-4
    assert all(metrics["grad_norm_preclip"] > 0 for metrics in runs.metrics(stage))


@pytest.mark.parametrize("decoder_mask", ["none", "running_cell"])
def test_videomae_gives_one_curve_on_one_rank_and_two(runs: Runs, decoder_mask: str) -> None:
    name = f"videomae_{decoder_mask}"
    options = ("--recipe=videomae_demo", f"objective.decoder_mask={decoder_mask}")
    runs.run(name, *options, "train.max_steps=10")
    runs.run(f"{name}_3", *options, "train.max_steps=10", ranks=2, stage="zero3")
    assert largest_difference(runs.losses(f"{name}_3"), runs.losses(name)) <= 1e-4
    assert runs.losses(name)[-1] < runs.losses(name)[0]


def test_accumulation_and_torchrun_give_the_curve_too(runs: Runs, plain: list[float]) -> None:
    torchrun = ("torchrun", "--nproc_per_node=2", f"--master_port={free_port()}")
    runs.run("torchrun", "train.max_steps=10", "train.micro_batch=2", launcher=torchrun)
    assert runs.summary("torchrun")["plan"]["accumulation"] == 2
    assert largest_difference(runs.losses("torchrun"), plain) <= 1e-4


def test_activation_checkpointing_changes_nothing_but_memory(
    runs: Runs, plain: list[float]
) -> None:
    runs.run("ac", "train.max_steps=10", stage="zero2_checkpointing")
    assert largest_difference(runs.losses("ac"), plain) <= 1e-6


@pytest.mark.parametrize("stage", ["zero0", "zero2", "zero3_offload"])
def test_half_precision_follows_the_curve_roughly(
    runs: Runs, plain: list[float], stage: str
) -> None:
    name = f"{stage}-bf16"
    output = runs.run(name, "train.max_steps=10", "train.precision=bf16", stage=stage)
    assert ("computes bf16 in software" in output) == emulates_bf16(torch.device("cpu"))
    assert largest_difference(runs.losses(name), plain) < 0.1
    weights = runs.folder / name / "model.safetensors"
    assert weights.stat().st_size > 4 * 250_000  # fp32, of so many parameters


def test_every_other_layer_recomputed_changes_nothing(
    runs: Runs, plain: list[float], tmp_path: Path
) -> None:
    tree = json.loads((ROOT / "ds_configs" / "zero2_checkpointing.json").read_text())
    tree["activation_checkpointing"]["every"] = 2
    config = tmp_path / "every2.json"
    config.write_text(json.dumps(tree))
    runs.run("every2", "train.max_steps=10", f"--deepspeed_config={config}")
    assert largest_difference(runs.losses("every2"), plain) <= 1e-6


@pytest.mark.slow
def test_compiled_layers_give_the_curve(runs: Runs, plain: list[float]) -> None:
    options = ("train.max_steps=10", "train.compile=true")
    output = runs.run("compiled", *options, stage="zero2_checkpointing")
    assert output.count("torch.compile took") == 1
    facts = json.loads((runs.folder / "compiled" / "run.json").read_text())
    assert facts["compiled"] is True
    assert facts["attention"] == dict.fromkeys(("encoder", "decoder_cross"), "flash_attention")
    assert largest_difference(runs.losses("compiled"), plain) <= 1e-4


@pytest.mark.slow
def test_the_optimiser_of_deepspeed_gives_the_curve_and_resumes(
    runs: Runs, plain: list[float]
) -> None:
    options = ("train.max_steps=10", "optim.implementation=deepspeed")
    runs.run("cpu_adam", *options, stage="zero3_offload", fault="interrupt:5:5:0", code=75)
    runs.run("cpu_adam", *options, stage="zero3_offload")
    assert largest_difference(runs.losses("cpu_adam"), plain) <= 1e-4


def test_fp16_on_a_cpu_is_refused(runs: Runs) -> None:
    output = runs.run("fp16", "train.precision=fp16", code=2)
    assert "use train.precision=bf16 or fp32" in output


def test_the_loss_falls(runs: Runs) -> None:
    """A silent no-op (nothing applied, wrong sign) would pass every equality above."""
    runs.run("falls", "train.max_steps=60", "train.total_batch=16", "train.micro_batch=16")
    losses = runs.losses("falls")
    assert losses[-1] < 0.8 * losses[0]


def interrupt_after(process: subprocess.Popen[str], text: str) -> str:
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if line.startswith(text):
            os.killpg(process.pid, signal.SIGINT)  # what Ctrl-C in a terminal does
            break
    seen += process.stdout.read()
    process.wait(timeout=120)
    return seen


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_interrupted_run_goes_on_to_the_curve_of_an_uninterrupted_one(
    runs: Runs, ranks: int
) -> None:
    launcher = runs.deepspeed(2) if ranks == 2 else ()
    whole, cut = f"whole{ranks}", f"cut{ranks}"
    runs.run(whole, "train.max_steps=24", ranks=ranks)
    process = runs.start(cut, "train.max_steps=24", launcher=launcher)
    try:
        output = interrupt_after(process, "step 8/")
    finally:
        stop(process)
    assert "interrupted after" in output, output[-3000:]
    # DeepSpeed's launcher dies of the Ctrl-C itself, or first of its ranks' ends: not ours to say.
    assert process.returncode == INTERRUPTED if ranks == 1 else process.returncode != 0
    stopped_at = len(runs.losses(cut))
    assert 8 <= stopped_at < 24
    output = runs.run(cut, "train.max_steps=24", ranks=ranks)
    assert f"going on after step {stopped_at}" in output
    assert runs.losses(cut) == runs.losses(whole)
    both = [(runs.folder / name / "model.safetensors").read_bytes() for name in (whole, cut)]
    assert both[0] == both[1]


def test_a_killed_run_goes_on_from_its_last_checkpoint(runs: Runs) -> None:
    runs.run("unkilled", "train.max_steps=30", "train.save_every=5")
    process = runs.start("killed", "train.max_steps=30", "train.save_every=5")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 13/"):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    # Lines of steps that are done again are dropped, and nothing is done twice.
    output = runs.run("killed", "train.max_steps=30", "train.save_every=5")
    assert "going on after step 10" in output or "going on after step 15" in output
    assert [metrics["step"] for metrics in runs.metrics("killed")] == list(range(1, 31))
    assert runs.losses("killed") == runs.losses("unkilled")
    kept = sorted(p.name for p in (runs.folder / "killed" / "checkpoints").glob("step-*"))
    assert kept == ["step-00000025", "step-00000030"]


def test_a_finished_run_is_left_alone_and_another_recipe_refused(runs: Runs) -> None:
    runs.run("done", "train.max_steps=3")
    before = (runs.folder / "done" / "metrics.jsonl").read_text()
    assert "nothing left to do" in runs.run("done", "train.max_steps=3")
    assert (runs.folder / "done" / "metrics.jsonl").read_text() == before
    output = runs.run("done", "train.max_steps=3", "optim.base_lr=1e-4", code=2)
    assert re.search(r"optim.base_lr was [\d.]+, is 0.0001", output)
    assert "Traceback" not in output


def test_other_shards_are_refused(runs: Runs, demo_shards: Path) -> None:
    runs.run("moved", "train.max_steps=3")
    more = ("train.max_steps=3", f"data.shards={demo_shards / 'test'}")
    assert "other shards" in runs.run("moved", *more, code=2)


def test_a_diverging_run_stops_with_the_reason(runs: Runs) -> None:
    output = runs.run("nan", "train.max_steps=60", "optim.base_lr=1e30", code=2)
    assert "were not applied, since loss or gradient was not finite" in output
    assert not (runs.folder / "nan" / "model.safetensors").exists()


def test_undecodable_videos_are_counted_and_stop_the_run_above_the_limit(
    runs: Runs, demo_shards: Path, tmp_path: Path
) -> None:
    shards = tmp_path / "damaged"
    shutil.copytree(demo_shards / "train", shards)
    (tar,) = shards.glob("*.tar")
    index = json.loads(next(shards.glob("*.index.json")).read_text())
    with tar.open("r+b") as file:
        for sample in index["samples"][:6]:  # one in eight
            file.seek(sample["offset"])
            file.write(bytes(sample["bytes"]))
    options = ("train.max_steps=30", f"data.shards={shards}")
    runs.run("tolerant", *options, "data.max_skipped_share=0.5")
    skipped = runs.metrics("tolerant")[-1]["data/skipped_total"]
    assert 0.5 < skipped / (30 * 8 / 8) < 1.5
    named = (runs.folder / "tolerant" / "quarantine-rank-00000.jsonl").read_text().splitlines()
    assert {json.loads(line)["key"] for line in named} <= {s["key"] for s in index["samples"][:6]}
    output = runs.run("strict", *options, ranks=2, code=2)
    assert "data.max_skipped_share=0.01" in output


def test_wandb_offline_records_the_run(runs: Runs) -> None:
    pytest.importorskip("wandb")
    output = runs.run("tracked", "train.max_steps=3", "wandb.mode=offline")
    assert list((runs.folder / "tracked" / "wandb").glob("offline-run-*/*.wandb"))
    # The last words are of the run, and W&B prints no table of the metrics.
    assert re.match(r"finished 3 of 3|note: ", output.splitlines()[-1])
    assert "Run summary" not in output
    assert len(runs.losses("tracked")) == 3


@pytest.mark.parametrize(("stage", "of_deepspeed"), [("zero0", 0), ("zero2", 2)])
def test_between_log_lines_the_loop_never_waits_for_the_device(
    runs: Runs, stage: str, of_deepspeed: int
) -> None:
    options = ("train.max_steps=12", "train.log_every=6", "train.save_every=12")
    script = Path(__file__).parent / "counting_pretrain.py"
    runs.run(f"syncs-{stage}", *options, stage=stage, script=script)
    counts = json.loads((runs.folder / "syncs.json").read_text())
    quiet = {"data", "forward", "backward", "update"}
    # The first step builds things; afterwards every step is the same.
    reads = {key: n for key, n in counts.items() if int(key.split()[1]) > 1}
    ours = {k: n for k, n in reads.items() if k.endswith("ours") and k.split()[0] in quiet}
    assert ours == {}
    assert any(key.startswith("log 6") for key in reads), "the counter counts"
    # DeepSpeed itself asks whether the gradient overflowed, once a step from stage 1 on.
    inside = {k: n for k, n in reads.items() if k.endswith("deepspeed")}
    assert max(inside.values(), default=0) <= of_deepspeed
