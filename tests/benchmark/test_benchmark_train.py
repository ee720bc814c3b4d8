"""scripts/benchmark_train.py: rows as they are asked for, and figures that can be checked."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from arvideo_ds.benchmark import step
from arvideo_ds.benchmark.compare import against_first, best_products, describe, summarize
from arvideo_ds.benchmark.operators import REST, Operator, by_group
from arvideo_ds.benchmark.rows import Row, read_row
from arvideo_ds.benchmark.step import attention_of, build_task, largest, random_batch
from arvideo_ds.cli import benchmark
from arvideo_ds.doctor.speed import matmul_gflops
from arvideo_ds.engine.resolve import zero_stage
from arvideo_ds.errors import UserError
from tests.conftest import ROOT, run_script

SCRIPT = ROOT / "scripts" / "benchmark_train.py"
CPU = torch.device("cpu")
SMALL = ("model.size=tiny", "train.precision=fp32")


def row(text: str, *overrides: str, micro_batch: int = 2) -> Row:
    json_file = ROOT / "ds_configs" / "zero0.json"
    return read_row(text, overrides, micro_batch=micro_batch, deepspeed_config=json_file)


def test_a_rows_own_settings_come_after_those_of_all() -> None:
    text = "demo:paper,objective.cluster=[1,8,8],decoder.target_ratio=0.25"
    read = row(text, "decoder.target_ratio=1.0", "objective.drop_ratio=0.5", micro_batch=6)
    assert (read.name, read.variant) == (text, "paper")
    assert read.recipe.objective.cluster == (1, 8, 8)
    assert read.recipe.decoder.target_ratio == 0.25
    assert read.recipe.objective.drop_ratio == 0.5
    assert (read.plan.micro_batch, read.plan.accumulation, read.plan.world_size) == (6, 1, 1)
    larger = read.with_batch(8)
    assert larger.deepspeed["train_micro_batch_size_per_gpu"] == 8
    assert larger.recipe.objective == read.recipe.objective


def test_a_row_may_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("base: demo\ndecoder: {target_ratio: 0.25}\n")
    assert row(f"{path}:paper").recipe.decoder.target_ratio == 0.25


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dmeo", "Did you mean 'demo'"),
        ("demo:papre", "there are: plain, paper"),
        ("demo,decoder.target_rato=1", "did you mean 'decoder.target_ratio'"),
        ("demo,decoder.target_ratio=7", "decoder.target_ratio=7"),
        ("absent/recipe.yaml", "there is no recipe"),
        ("finetune_demo", "`arvideo finetune`"),
    ],
)
def test_a_row_that_is_wrong_is_said(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        row(text)


@pytest.mark.parametrize("size", [0, 3])
def test_a_batch_that_cannot_be_is_said(size: int) -> None:
    # The demo cuts two clips of each video.
    with pytest.raises(UserError, match=r"micro_batch|data\.repeats"):
        row("demo", micro_batch=size)


@pytest.mark.parametrize("extra", [(), ("decoder.self_attention=true", "decoder.target_ratio=1")])
def test_the_papers_way_computes_the_same(extra: tuple[str, ...]) -> None:
    """Loss and every gradient; of the same draws, since keys decide them."""
    found = []
    for variant in ("plain", "paper"):
        one = row(f"demo:{variant}", *extra)
        torch.manual_seed(0)
        task = build_task(one)
        with attention_of(variant):
            loss = task(random_batch(one.recipe, 2, CPU))
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in task.named_parameters()}))
    (loss, gradients), (paper_loss, paper_gradients) = found
    torch.testing.assert_close(paper_loss, loss)
    torch.testing.assert_close(paper_gradients, gradients, rtol=1e-4, atol=1e-6)


def test_what_is_counted_is_what_the_formulas_say() -> None:
    plain, paper = (describe(row(f"demo:{variant}")) for variant in ("plain", "paper"))
    assert plain["gflop_forward_per_clip"] == plain["gflop_forward_per_clip_by_formula"]
    # A product has two of its size in the backward pass, the first of all only one.
    ratio = plain["gflop_step_per_clip"] / plain["gflop_forward_per_clip"]
    assert 2.9 < ratio < 3
    geometry = row("demo").recipe.geometry
    not_encoded = geometry.num_tokens - plain["tokens_encoded"]
    more = 2 * not_encoded * geometry.cube_values * 128 / 1e9
    assert paper["gflop_forward_per_clip"] == pytest.approx(plain["gflop_forward_per_clip"] + more)


def test_rates_follow_from_times() -> None:
    described = {"micro_batch": 4, "gflop_step_per_clip": 100.0}
    rounds = [
        {
            "step_ms": ms,
            "clip_ms": ms / 4,
            "forward_ms": ms / 4,
            "backward_ms": ms / 2,
            "optimizer_ms": ms / 4,
            "matmul_tflops": 1.0,
        }
        for ms in (1000.0, 2000.0, 500.0)
    ]
    others = [{**rounds[0], "matmul_tflops": 2.0}]
    products = best_products([row("demo"), row("demo")], [rounds, others])
    assert products == {"fp32": 2.0}
    found = summarize(described, rounds, peak_bytes=2**30, matmul_tflops=products["fp32"])
    assert found["clips_per_s"] == {"median": 4, "min": 2, "max": 8}
    assert found["tflops"]["median"] == pytest.approx(0.4)
    assert found["share_of_matmul_pct"] == pytest.approx(20)
    assert found["peak_gib"] == 1
    assert found["k400_800_epochs_hours"] == pytest.approx(240_000 * 800 / 4 / 3600)
    assert found["share_of_peak_pct"] is None
    found = summarize(described, rounds, 2**30, matmul_tflops=2.0, peak_tflops=4.0)
    assert found["share_of_peak_pct"] == pytest.approx(10)
    # Of 8 clips against 4: time per clip counts.
    slower = [{"step_ms": 2.5 * one["step_ms"], "clip_ms": 1.25 * one["clip_ms"]} for one in rounds]
    against = against_first(slower, rounds, 3 * 2**30, 2**31)
    # Of the same rounds: however much the machine drifts, 25 % stay 25 %.
    assert against["time_pct"] == {"median": 25, "min": 25, "max": 25}
    assert against["memory_pct"] == pytest.approx(50)
    assert against_first(slower, rounds, None, None)["memory_pct"] is None
    assert summarize(described, rounds, None, matmul_tflops=2.0)["peak_gib"] is None


@pytest.mark.parametrize(
    ("gpu", "given", "expected"),
    [
        (False, [], [("demo", 8, 0)]),
        (True, [], [("demo", 64, 1)]),
        (True, ["--micro_batch", "2,4"], [("demo", 2, 1), ("demo", 4, 1)]),
        (True, ["--deepspeed_config", "zero2"], [("demo", 64, 2)]),
    ],
)
def test_a_gpu_has_its_own_defaults(
    gpu: bool, given: list[str], expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["benchmark", "--compare", "demo", *given, "train.precision=fp32"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(benchmark, "uses_gpu", lambda: gpu)
    args = benchmark.parse_arguments()
    rows = benchmark.read_rows(args)
    found = [(one.name, one.plan.micro_batch, zero_stage(one.deepspeed)) for one in rows]
    assert found == expected
    assert {one.recipe.train.precision for one in rows} == {"fp32"}


def test_the_matrix_product_is_of_random_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU multiplies equal values faster than any model's: the share of it would be too low."""
    seen = []

    def multiply(one: torch.Tensor, other: torch.Tensor) -> None:
        seen.append((one[0].unique().numel(), other[0].unique().numel()))

    monkeypatch.setattr(torch, "mm", multiply)
    matmul_gflops(CPU)
    assert min(map(min, seen)) > 1000


@pytest.mark.parametrize("most", [0, 1, 2, 3, 5, 63, 64, 100])
def test_the_largest_batch_is_found(most: int) -> None:
    asked: list[int] = []

    def fits(number: int) -> bool:
        asked.append(number)
        return number <= most

    assert largest(fits) == most
    assert len(asked) == len(set(asked)) <= 16


def test_a_batch_out_of_memory_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def weigh(one: Row, device: torch.device) -> int:
        if one.plan.micro_batch > 10:
            raise torch.OutOfMemoryError
        return 1

    monkeypatch.setattr(step, "peak_bytes", weigh)
    demo = row("demo", "data.repeats=1")
    assert largest(lambda size: step.fits_in_memory(demo.with_batch(size), CPU)) == 10


def test_operators_are_grouped_and_the_rest_is_named() -> None:
    names = {
        "aten::addmm": "matrix products",
        "aten::mm": "matrix products",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward": "attention",
        "aten::_softmax_backward_data": "attention",
        "aten::bmm": "attention",
        "aten::native_layer_norm_backward": "normalisation",
        "aten::gelu_backward": "activation",
        "aten::_fused_adamw_": "optimiser",
        "aten::copy_": REST,
    }
    table = by_group([Operator(name, "2x2", 1.0, 1.0) for name in names])
    assert table["self_ms_per_step"] == len(names)
    shares = {
        group: 100 / len(names) * list(names.values()).count(group) for group in names.values()
    }
    for group, share in shares.items():
        assert table["groups"][group]["share_pct"] == pytest.approx(share, abs=0.01)
    assert [line["operator"] for line in table["rest"]] == ["aten::copy_"]


@pytest.mark.slow
def test_the_whole_document(demo_shards: Path, tmp_path: Path) -> None:
    train = next(path.parent for path in demo_shards.rglob("manifest.json"))
    done = run_script(
        SCRIPT, "--micro_batch", "4", "--rounds", "2", "--steps", "2", "--warm_up", "1",
        "--profile", "--trace", tmp_path / "traces", "--shards", train,
        "--compare", "demo", "demo:paper", "data.workers=0", "train.peak_tflops=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    assert document["settings"]["overrides"] == ["data.workers=0", "train.peak_tflops=2"]
    assert {"device", "cpu", "threads", "torch", "commit"} <= document["machine"].keys()
    assert document["settings"]["deepspeed_config"] == "zero0.json"
    ours, paper = document["rows"]
    assert (ours["variant"], paper["variant"]) == ("plain", "paper")
    for one in (ours, paper):
        assert one["step_ms"]["min"] <= one["step_ms"]["median"] <= one["step_ms"]["max"]
        parts = sum(one[f"{part}_ms"]["median"] for part in ("forward", "backward", "optimizer"))
        assert parts == pytest.approx(one["step_ms"]["median"], rel=0.5)
        shares = [group["share_pct"] for group in one["profile"]["groups"].values()]
        assert sum(shares) == pytest.approx(100, abs=0.1)
        assert one["profile"]["groups"]["optimiser"]["ms"] > 0
        assert one["share_of_peak_pct"] == pytest.approx(50 * one["tflops"]["median"], rel=1e-3)
    fused, math = ("flash_attention", "math")
    assert [set(one["attention"].values()) for one in (ours, paper)] == [{fused}, {math}]
    assert (ours["compile"], paper["compile"]) == (False, False)
    # Scores and their softmax are kept for the backward pass.
    assert paper["peak_gib"] > ours["peak_gib"]
    assert ours["peak_gib_by_formula"] == pytest.approx(ours["peak_gib"], rel=0.15)
    assert paper["peak_gib_by_formula"] is None
    assert paper["against_first"]["memory_pct"] > 0
    assert document["from_shards"]["clips"] == 2 * 2 * 4
    assert 0 <= document["from_shards"]["data_wait_pct"] <= 100
    assert "%" in next(line for line in done.stderr.splitlines() if REST in line)
    assert len(list((tmp_path / "traces").iterdir())) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--compare", "demo:papre"), "there is no variant 'papre'"),
        (("--compare", "train.seed=1"), "names no row"),
        (("--rounds", "0"), "--rounds 0"),
        (("--shards", "absent"), "no shards in absent"),
        pytest.param(
            ("--compare", "demo", "--largest_batch"),
            "--largest_batch needs a GPU",
            marks=pytest.mark.slow,  # imports torch and DeepSpeed
        ),
        (("--trace", "t"), "add --profile"),
    ],
)
def test_what_is_asked_wrongly_is_one_paragraph(arguments: tuple[str, ...], said: str) -> None:
    done = run_script(SCRIPT, *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert said in done.stderr
