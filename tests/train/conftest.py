"""Real runs of scripts/pretrain.py on small shards, for all tests of this room."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import warm_start
from tests.conftest import ROOT, free_port

PRETRAIN = ROOT / "scripts" / "pretrain.py"
FAULTY = Path(__file__).parent / "faulty_pretrain.py"
LOSS = "loss/pretrain"


class Runs:
    """Starts runs of the demo recipe on the test's shards; each in a folder of its own."""

    def __init__(self, folder: Path, shards: Path, environment: dict[str, str]) -> None:
        self.folder, self.shards, self.environment = folder, shards, environment

    def command(
        self,
        name: str,
        *overrides: str,
        stage: str = "zero2",
        script: Path = PRETRAIN,
        recipe: str = "demo",
    ) -> list[str]:
        return [
            str(script),
            f"--deepspeed_config={ROOT}/ds_configs/{stage}.json",
            f"--output={self.folder / name}",
            f"--recipe={recipe}",
            f"data.shards={self.shards}",
            "data.num_streams=12",
            "data.workers=1",
            "train.log_every=1",
            "train.total_batch=8",
            "train.micro_batch=8",
            "optim.warmup_steps=3",
            "model.size=nano",
            *overrides,
        ]

    def start(
        self,
        *args: Any,
        launcher: tuple[str, ...] = (),
        ranks: int = 1,
        fault: str | None = None,
        **options: Any,
    ) -> subprocess.Popen[str] | warm_start.Process:
        """Start a run; `fault` is one of faulty_pretrain.py.

        By `launcher`, a command, where a test is about it or needs its processes; else as `ranks`
        processes that have torch imported already.
        """
        environment = dict(self.environment)
        if fault is not None:
            environment["ARVIDEO_FAULT"] = fault
            environment["ARVIDEO_SCRIPT"] = options.get("script", PRETRAIN).name
            options["script"] = FAULTY
        folder = options.pop("cwd", self.folder)
        command = self.command(*args, **options)
        if not launcher:
            return warm_start.start(command, cwd=folder, env=environment, ranks=ranks)
        return subprocess.Popen(
            [*launcher, *command],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *args: Any, code: int | None = 0, **options: Any) -> str:
        """Run to the end and return the output; `code` None takes any failure."""
        process = self.start(*args, **options)
        try:
            output, _ = process.communicate(timeout=360)  # DeepSpeed may compile
        finally:
            stop(process)
        if code is None:
            assert process.returncode != 0, output[-4000:]
        else:
            assert process.returncode == code, output[-4000:]
        return output

    def deepspeed(self, ranks: int) -> tuple[str, ...]:
        return ("deepspeed", f"--num_gpus={ranks}", f"--master_port={free_port()}")

    def losses(self, name: str) -> list[float]:
        return [metrics[LOSS] for metrics in self.metrics(name)]

    def metrics(self, name: str) -> list[dict[str, Any]]:
        return metrics_of(self.folder / name)

    def summary(self, name: str) -> dict[str, Any]:
        return dict(json.loads((self.folder / name / "summary.json").read_text()))


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """What a run logged, step by step."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def stop(process: subprocess.Popen[str] | warm_start.Process) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def processes_of(folder: Path) -> list[int]:
    """Process ids of a run's ranks, by what they write themselves."""
    beats = (folder / "heartbeats").glob("rank-*.json")
    return [json.loads(path.read_text())["pid"] for path in beats]


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
    demo_shards: Path,
    environment: Callable[..., dict[str, str]],
) -> Runs:
    # The demo recipe's own shards are not wanted here, so they are said to be there.
    folder = tmp_path_factory.mktemp("runs")
    for split in ("train", "test"):
        (folder / "data" / "demo" / split).mkdir(parents=True)
        shutil.copy(demo_shards / split / "manifest.json", folder / "data" / "demo" / split)
    return Runs(folder, demo_shards / "train", environment())
