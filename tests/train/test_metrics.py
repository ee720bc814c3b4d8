"""Sinks: metrics.jsonl keeps exactly what a resumed run builds on."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from arvideo_ds.config import PretrainRecipe
from arvideo_ds.data.loader import Skipped
from arvideo_ds.runs.run_folder import (
    METRICS,
    QUARANTINE,
    excluded_videos,
    read_metrics,
    read_of_ranks,
)
from arvideo_ds.tasks import task_of
from arvideo_ds.train import metrics
from arvideo_ds.train.metrics import Console, JsonLines, Meter, quarantine


def steps_of(folder: Path) -> list[float]:
    return [line["step"] for line in read_metrics(folder)]


def logged(folder: Path, *steps: int, first_step: int = 0) -> None:
    lines = JsonLines(folder, first_step)
    for step in steps:
        lines.log({"step": step, "loss/pretrain": 1 / step})


def test_a_resumed_run_drops_the_lines_that_it_will_write_again(tmp_path: Path) -> None:
    logged(tmp_path, 10, 20, 30, 40)
    logged(tmp_path, 30, first_step=20)
    assert steps_of(tmp_path) == [10, 20, 30]
    assert read_metrics(tmp_path)[1] == {"step": 20, "loss/pretrain": 0.05}


def test_a_run_from_scratch_drops_all_lines(tmp_path: Path) -> None:
    logged(tmp_path, 10, 20)
    logged(tmp_path)
    assert steps_of(tmp_path) == []


def test_a_folder_without_metrics_has_none(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


def test_a_line_that_was_cut_off_does_not_stop_a_resumed_run(tmp_path: Path) -> None:
    logged(tmp_path, 10, 20)
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 30, "loss/pre')
    logged(tmp_path, 30, first_step=20)
    assert steps_of(tmp_path) == [10, 20, 30]


def test_what_is_no_number_is_null(tmp_path: Path) -> None:
    JsonLines(tmp_path, 0).log({"step": 1, "loss/pretrain": math.nan, "norm": math.inf, "lr": 0.5})
    assert (tmp_path / METRICS).read_text() == (
        '{"step": 1, "loss/pretrain": null, "norm": null, "lr": 0.5}\n'
    )


def test_the_console_says_a_step_in_one_line(
    tiny: Callable[..., PretrainRecipe], capsys: pytest.CaptureFixture[str]
) -> None:
    console = Console(60, task_of(tiny()))
    metrics = {
        "step": 30,
        "epoch": 0.5,
        "loss/pretrain": 0.75,
        "lr": 1e-3,
        "throughput/clips_per_s": 12.0,
        "time/data_wait_pct": 3.0,
        "time/step_s": 2.0,
        "memory/peak_gib": 1.5,
        "data/skipped_total": 0.0,
        "guard/refused_total": 0.0,
        "time/forward_s_median": 0.2,
        "time/forward_s_max": 0.25,
        "slowest_host": "node2",
    }
    compile_s = {"time/compile_s": 35.0}
    console.log({**metrics, **compile_s})
    assert capsys.readouterr().out.startswith("torch.compile took 35.0 s\nstep 30/60")
    console.log({**metrics, **compile_s})
    more = {"data/skipped_total": 4.0, "throughput/share_of_peak": 0.414}
    console.log({**metrics, **more, "grad_norm_preclip": 0.125})
    console.log({**metrics, "guard/refused_total": 2.0, "time/forward_s_max": 0.5})
    first, second, third = capsys.readouterr().out.splitlines()
    assert "step 30/60" in first
    assert "left 0:01:00" in first
    assert "skipped" not in first
    assert "of peak" not in first
    assert "skipped 4" in second
    assert "clips/s  41% of peak  " in second
    assert "grad 0.125" in second
    assert "node2" not in first
    assert "slow host node2: forward 0.500 s a step, median 0.200 s" in third
    assert "steps not applied 2" in third


def test_ranks_append_their_undecodable_videos(tmp_path: Path) -> None:
    quarantine(tmp_path, 0, [])
    assert not list(tmp_path.iterdir())
    quarantine(tmp_path, 0, [Skipped("a", "io", "cut"), Skipped("b", "io", "cut")])
    quarantine(tmp_path, 3, [Skipped("c", "io", 'a "word"\nmore')])
    (tmp_path / "quarantine.jsonl").write_text('{"key": "old", "kind": "hang", "rank": 9}\n')
    lines = read_of_ranks(tmp_path, QUARANTINE)
    assert [(line["key"], line["rank"]) for line in lines] == [
        ("old", 9),
        ("a", 0),
        ("b", 0),
        ("c", 3),
    ]
    assert excluded_videos(tmp_path) == {"old": "hang"}
    assert len(list(tmp_path.iterdir())) == 3, "a file for each rank, and that of older runs"


def test_clips_of_ranks_that_share_them_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of each rank: loss, finite ones, clips, skipped, data wait, forward, elapsed.
    ranks = [[2.0, 1, 4, 1, 0, 0.1, 2], [2.0, 1, 4, 1, 0, 0.2, 2]]
    ranks += [[6.0, 1, 4, 0, 0, 0.3, 2], [6.0, 1, 4, 0, 0, 0.4, 2]]
    monkeypatch.setattr(metrics, "gather_over_ranks", lambda own, device: ranks)
    meter = Meter(torch.device("cpu"), "pretrain", sharing=2)
    meter.losses, meter.refused = [torch.tensor(2.0)], [torch.tensor(0.0)]
    found = meter.read([f"host{rank}" for rank in range(4)])
    assert found.metrics["loss/pretrain"] == 4
    assert (found.metrics["data/seen"], found.metrics["data/skipped"]) == (8, 1)
    assert found.metrics["throughput/clips_per_s"] == 4
    assert found.metrics["throughput/clips_per_s_per_gpu"] == 1
    assert found.metrics["time/forward_s_max"] == 0.4
    assert found.metrics["slowest_host"] == "host3"


def test_model_operations_are_counted_forward_and_backward(
    monkeypatch: pytest.MonkeyPatch, tiny: Callable[..., PretrainRecipe]
) -> None:
    ranks = 2 * [[2.0, 1, 4, 0, 0, 0.1, 2]]
    monkeypatch.setattr(metrics, "gather_over_ranks", lambda own, device: ranks)
    cpu = torch.device("cpu")
    stated = tiny(train={"peak_tflops": 1.2}).train
    for settings, share in ((tiny().train, None), (stated, 0.5)):
        peak = metrics.peak_tflops(settings, cpu)
        meter = Meter(cpu, "pretrain", gflops=100, peak_tflops=peak)
        meter.losses, meter.refused = [torch.tensor(2.0)], [torch.tensor(0.0)]
        found = meter.read(["a", "b"]).metrics
        # 2 clips a second on each of two GPUs, of 300 GFLOP.
        assert found["throughput/tflops_per_gpu"] == pytest.approx(0.6)
        assert found.get("throughput/share_of_peak") == (share and pytest.approx(share))


def test_the_peak_of_a_gpu_follows_from_its_name(
    monkeypatch: pytest.MonkeyPatch, tiny: Callable[..., PretrainRecipe]
) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert metrics.peak_tflops(tiny(train={"precision": "bf16"}).train, gpu) == 989.5
    assert metrics.peak_tflops(tiny(train={"peak_tflops": 7}).train, gpu) == 7
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another")
    assert metrics.peak_tflops(tiny(train={"precision": "bf16"}).train, gpu) is None
