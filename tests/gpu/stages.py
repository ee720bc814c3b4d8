"""The stages of check.py: each a function that measures and writes what it has found so far.

    python tests/gpu/stages.py [--tiny] STAGE RESULT.json

Exit code 1: measured, and not as it should be. On an imaginary GPU values are not judged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from arvideo_ds.benchmark.measure import machine, query_gpu
from arvideo_ds.benchmark.step import random_batch
from arvideo_ds.cli import benchmark as benchmark_command
from arvideo_ds.config import FinetuneRecipe, Recipe, load_recipe
from arvideo_ds.doctor.examine import examine
from arvideo_ds.doctor.speed import matmul_gflops
from arvideo_ds.engine.world import start_world
from arvideo_ds.shards.demo_set import DEMO
from arvideo_ds.shards.synthetic import ensure_shards
from arvideo_ds.tasks.finetune import Finetune
from arvideo_ds.tasks.pretrain import Pretrain
from tests.benchmark.measure_peak import peaks
from tests.gpu.check import ROOT, imaginary, write
from tests.gpu.launch import prepare

CUDA = torch.device("cuda")
CLOCKS = (
    "name,driver_version,pstate,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,temperature.gpu,"
    "power.draw,power.limit,memory.total,ecc.mode.current,mig.mode.current"
)
VIT_B = "pretrain_vit_b_k400"
MODELS = {
    "ARVideo-B, half the targets": [VIT_B, "decoder.target_ratio=0.5"],
    "ARVideo-B, all targets": [VIT_B, "decoder.target_ratio=1"],
    **{f"ARVideo-{size}": [f"pretrain_vit_{size.lower()}_k400"] for size in "LHg"},
    "VideoMAE-B": ["videomae_vit_b_k400"],
    "fine-tuning B": ["finetune_vit_b_k400"],
}
BATCHES = {"B": 64, "L": 32, "H": 16, "g": 8}
TIMED = 20  # passes
STEPS, MOST_DIFFERENCE = 20, 1e-2
MOST_ERROR = 0.1

Report = Callable[[dict[str, Any]], None]


def doctor(report: Report, folder: Path, *, tiny: bool) -> bool:
    """Driver, clocks, versions, peak of matrix products, bandwidth, attention kernel per shape."""
    found: dict[str, Any] = {"machine": machine(CUDA)}
    values = (query_gpu(CLOCKS) or "").split(", ")
    found["nvidia_smi"] = dict(zip(CLOCKS.split(","), values, strict=False))
    found["findings"] = [dataclasses.asdict(finding) for finding in examine(folder)]
    report(found)
    found["matmul_tflops"] = {
        name: matmul_gflops(CUDA, dtype) / 1000
        for name, dtype in (
            ("bf16", torch.bfloat16),
            ("fp16", torch.float16),
            ("fp32", torch.float),
        )
    }
    found["copy_gb_s"] = copy_bandwidth()
    report(found)
    found["attention"] = {
        name: [{**call.describe(), "kernel": chosen(call)} for call in calls]
        for name, calls in attention_calls(tiny=tiny).items()
    }
    report(found)
    return True


def copy_bandwidth() -> dict[str, float]:
    """GB/s of copies inside the GPU (read + write) and to it from pinned memory."""
    there, num_bytes = torch.empty(2**28, dtype=torch.uint8, device=CUDA), 2**28
    other, pinned = torch.empty_like(there), torch.empty(2**28, dtype=torch.uint8).pin_memory()
    return {
        "on_the_gpu": 2 * num_bytes / milliseconds(lambda: other.copy_(there)) / 1e6,
        "to_the_gpu": num_bytes
        / milliseconds(lambda: other.copy_(pinned, non_blocking=True))
        / 1e6,
    }


def milliseconds(call: Callable[[], object]) -> float:
    """Mean time on the GPU, after some calls to warm up."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for number in range(3 + TIMED):
        if number == 3:
            start.record()
        call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / TIMED


class Call:
    """The tensors of one call of scaled dot-product attention, without values."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
        self.inputs, self.mask = (query, key, value), mask

    def describe(self) -> dict[str, Any]:
        query, key, _ = self.inputs
        mask = None if self.mask is None else f"{self.mask.dtype} {list(self.mask.shape)}"
        return {"query": list(query.shape), "key": list(key.shape), "mask": mask}

    def on_gpu(self) -> tuple[list[Tensor], Tensor | None]:
        def make(tensor: Tensor) -> Tensor:
            size, strides = tensor.shape, tensor.stride()
            made = torch.empty_strided(size, strides, dtype=tensor.dtype, device=CUDA)
            return made.fill_(True) if tensor.dtype is torch.bool else made.normal_()

        inputs = [make(tensor).requires_grad_() for tensor in self.inputs]
        return inputs, None if self.mask is None else make(self.mask)


class Calls(TorchFunctionMode):
    """Records the different calls of attention in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, Call] = {}

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        named = kwargs or {}
        if function is F.scaled_dot_product_attention:
            mask = args[3] if len(args) > 3 else named.get("attn_mask")
            call = Call(*args[:3], mask)
            self.found.setdefault(json.dumps(call.describe()), call)
        return function(*args, **named)


def attention_calls(*, tiny: bool) -> dict[str, list[Call]]:
    """Of every model in bf16, from a forward pass without memory."""
    models = {"demo": ["demo"]} if tiny else MODELS
    return {name: calls_of(recipe, 2 if tiny else 64) for name, recipe in models.items()}


def calls_of(recipe_and_settings: list[str], size: int) -> list[Call]:
    name, *settings = recipe_and_settings
    recipe: Any = load_recipe(name, settings, Recipe)
    with torch.device("meta"), Calls() as calls:
        is_finetune = isinstance(recipe, FinetuneRecipe)
        task = Finetune(recipe, 400) if is_finetune else Pretrain(recipe)
        batch = random_batch(recipe, size, torch.device("cpu")).to(torch.device("meta"))
        task.to(torch.bfloat16)(batch)
    return list(calls.found.values())


def chosen(call: Call) -> str:
    """The kernel that PyTorch chooses by itself."""
    inputs, mask = call.on_gpu()
    return SDPBackend(torch._fused_sdp_choice(*inputs, mask)).name


def attention(report: Report, folder: Path, *, tiny: bool) -> bool:
    """Milliseconds of forward and backward pass, by kernel, with the model's mask and without."""
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if not imaginary():  # which has no cuDNN
        kernels.insert(0, SDPBackend.CUDNN_ATTENTION)
    found: dict[str, Any] = {}
    for name, calls in attention_calls(tiny=tiny).items():
        found[name] = []
        for call in calls:
            inputs, mask = call.on_gpu()
            times: dict[str, Any] = {}
            for mask_name, used in {"mask": mask, "no mask": None}.items():
                if mask_name == "no mask" or mask is not None:
                    times[mask_name] = {k.name: time_of(k, inputs, used) for k in kernels}
            found[name].append({**call.describe(), "ms": times})
            report({"attention": found})
    return True


def time_of(kernel: SDPBackend, inputs: list[Tensor], mask: Tensor | None) -> float | str:
    """Or why the kernel does not do it."""

    def both_passes() -> None:
        F.scaled_dot_product_attention(*inputs, attn_mask=mask).backward(inputs[0])

    try:
        with sdpa_kernel(kernel):
            return milliseconds(both_passes)
    except (RuntimeError, torch.OutOfMemoryError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def benchmark_eager(report: Report, folder: Path, *, tiny: bool) -> bool:
    """`arvideo benchmark` at both micro-batches, without torch.compile."""
    report(benchmark(["eager"], tiny=tiny))
    return True


def benchmark_compiled(report: Report, folder: Path, *, tiny: bool) -> bool:
    """The same with torch.compile."""
    report(benchmark(["compiled"], tiny=tiny))
    return True


def traces(report: Report, folder: Path, *, tiny: bool) -> bool:
    """Operators of a step, grouped, and Chrome traces: row_1.json eager, row_2.json compiled."""
    options = ["--profile", "--trace", str(folder / "traces")]
    report(benchmark(["eager", "compiled"], *options, tiny=tiny, brief=True))
    return True


def benchmark(modes: list[str], *options: str, tiny: bool, brief: bool = False) -> dict[str, Any]:
    rows, sizes = [f"{VIT_B},decoder.target_ratio={ratio}" for ratio in (0.5, 1)], "64,128"
    effort = "--rounds 4 --steps 5 --warm_up 3"
    if brief:
        rows, sizes, effort = rows[:1], "64", "--rounds 1 --steps 3 --warm_up 3"
    if tiny:
        rows, sizes, effort = ["demo"], "2", "--rounds 1 --steps 1 --warm_up 1"
    compiled = {mode: f"train.compile={mode == 'compiled'}".lower() for mode in modes}
    rows = [f"{row},{compiled[mode]}" for mode in modes for row in rows]
    arguments = ["--micro_batch", sizes, *effort.split(), *options]
    return run_benchmark(*arguments, "--compare", *rows, "train.precision=bf16")


def run_benchmark(*arguments: str) -> dict[str, Any]:
    sys.argv = ["benchmark", *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = benchmark_command.main()
    if code:
        raise SystemExit(code)
    document: dict[str, Any] = json.loads(printed.getvalue())
    return document


class Outcomes:
    """A plugin of pytest that reports after every test."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self.found: dict[str, Any] = {"passed": 0, "skipped": 0, "failed": {}}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            text = crash.message if crash else str(report.longrepr)
            self.found["failed"][report.nodeid] = text.partition("\n")[0]
        elif report.skipped:
            self.found["skipped"] += 1
        elif report.when == "call":
            self.found["passed"] += 1
        self._report(self.found)


def tests(report: Report, folder: Path, *, tiny: bool) -> bool:
    """`pytest -m gpu`."""
    outcomes = Outcomes(report)
    # Other files may need packages that are not here.
    files = [p for p in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in p.read_text()]
    where = [*map(str, files), "--continue-on-collection-errors"]
    if tiny:  # a stage of its own compiles
        where = ["tests/gpu/test_engine_gpu.py", "-k", "not compiled"]
    options = ["-m", "gpu", "--junitxml", str(folder / "tests.xml"), "-p", "no:cacheprovider"]
    code = pytest.main([*options, *where], plugins=[outcomes])
    return code == 0 or (imaginary() and code == pytest.ExitCode.TESTS_FAILED)


def memory(report: Report, folder: Path, *, tiny: bool) -> bool:
    """Peak of two steps at ZeRO-1 in bf16, measured and as the planner predicts."""
    start_world()
    cases = {size: ([f"pretrain_vit_{size.lower()}_k400"], n) for size, n in BATCHES.items()}
    if tiny:
        cases = {"demo": (["demo", "train.precision=bf16"], 4)}
    found: dict[str, Any] = {}
    for name, (recipe, size) in cases.items():
        found[name] = {"micro_batch": size}
        case = {"deepspeed": {"zero_optimization": {"stage": 1}}, "micro_batch": size}
        try:
            predicted, measured = peaks({**case, "recipe": recipe}, CUDA)
        except torch.OutOfMemoryError as error:
            found[name]["error"] = str(error).partition("\n")[0]
        else:
            found[name] |= {
                "predicted_gib": predicted / 2**30,
                "measured_gib": measured / 2**30,
                "ratio": predicted / measured,
            }
        report(found)
    return tiny or all(abs(case.get("ratio", 0) - 1) <= MOST_ERROR for case in found.values())


def demo(report: Report, folder: Path, *, tiny: bool) -> bool:
    """The demo on the CPU and on the GPU: the losses of the first steps."""
    shards, steps = demo_shards(folder), 2 if tiny else STEPS
    hidden = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    fake = ("LD_PRELOAD", "LD_LIBRARY_PATH", "FAKECUDA") if imaginary() else ()
    plain = {name: value for name, value in os.environ.items() if name not in fake}
    found: dict[str, Any] = {}
    for device, variables in {"cuda": dict(os.environ), "cpu": {**plain, **hidden}}.items():
        run = folder / f"demo_{device}"
        command = [
            sys.executable,
            str(ROOT / "tests/gpu/launch.py"),
            "pretrain",
            "--recipe",
            "demo",
        ]
        command += ["--output", str(run), f"data.shards={shards}", f"train.max_steps={steps}"]
        command += ["train.log_every=1", "optim.warmup_steps=1", "probe.every_epochs=null"]
        command += ["train.compile=false"]
        subprocess.run(command, env=variables, cwd=ROOT, check=True)
        lines = (run / "metrics.jsonl").read_text().splitlines()
        found[device] = [json.loads(line)["loss/pretrain"] for line in lines]
        report(found)
    pairs = list(zip(found["cuda"], found["cpu"], strict=True))
    found["most_difference"] = max(abs(ours / theirs - 1) for ours, theirs in pairs)
    report(found)
    return imaginary() or found["most_difference"] <= MOST_DIFFERENCE


def shards(report: Report, folder: Path, *, tiny: bool) -> bool:
    """A step fed by the loader from H.264 files, beside the same step without one."""
    row, size = f"{VIT_B},decoder.target_ratio=0.5", "64"
    if tiny:
        row, size = "demo,train.compile=false", "4"
    effort = "--rounds 1 --steps 2 --warm_up 1" if tiny else "--rounds 4 --steps 10 --warm_up 3"
    arguments = ["--micro_batch", size, *effort.split(), "--shards", str(demo_shards(folder))]
    report(run_benchmark(*arguments, "--compare", row, "train.precision=bf16"))
    return True


def demo_shards(folder: Path) -> Path:
    """Of 96 videos, made once."""
    ensure_shards(dataclasses.replace(DEMO, splits={"train": 96}), folder / "demo_shards")
    return folder / "demo_shards" / "train"


STAGES: dict[str, Callable[..., bool]] = {
    stage.__name__: stage
    for stage in (
        doctor,
        benchmark_eager,
        benchmark_compiled,
        traces,
        tests,
        attention,
        memory,
        demo,
        shards,
    )
}


def main() -> int:
    *options, name, path = sys.argv[1:]
    result = Path(path)
    prepare()

    def report(found: dict[str, Any]) -> None:
        write(result, found)

    return int(not STAGES[name](report, result.parent, tiny="--tiny" in options))


if __name__ == "__main__":
    sys.exit(main())
