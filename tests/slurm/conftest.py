"""A real Slurm cluster of two emulated nodes, where the machine has what starts one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.slurm import cluster as emulation

SBATCH = ROOT / "scripts" / "slurm" / "pretrain.sbatch"


class Cluster:
    """Slurm's commands on the cluster in `folder`."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = {**environment, "SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        """Also brings back a node without power."""
        emulation.start(self.folder)

    def stop(self, node: str | None = None) -> None:
        """Everything, or one node as if its power failed."""
        emulation.stop(self.folder, node)

    def call(self, *command: str | Path, check: bool = True, **environment: str) -> str:
        done = subprocess.run(
            [str(part) for part in command],
            cwd=ROOT,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0 or not check, done.stdout
        return done.stdout

    def fact(self, job: str, name: str) -> str:
        shown = self.call("scontrol", "show", "job", job)
        found = re.search(rf"\b{name}=(\S+)", shown)
        assert found, shown
        return found.group(1)

    @staticmethod
    def wait(condition: Callable[[], bool], timeout_s: float, what: str, log: Path) -> float:
        """Seconds until it held."""
        started = time.monotonic()
        while not condition():
            waited_s = time.monotonic() - started
            said = log.read_text()[-4000:] if log.is_file() else "no log"
            assert waited_s < timeout_s, f"no {what} in {timeout_s} s:\n{said}"
            time.sleep(0.2)
        return time.monotonic() - started


class Job:
    """A run of the demo recipe, started by scripts/slurm/pretrain.sbatch."""

    def __init__(self, cluster: Cluster, folder: Path, arguments: list[str], *sbatch: str) -> None:
        self.cluster, self.folder, self.run = cluster, folder, folder / "run"
        self.id = cluster.call(
            "sbatch", "--parsable", f"--output={self.log_file}", *sbatch, SBATCH, *arguments
        ).strip()

    @property
    def log_file(self) -> Path:
        return self.folder / "job.log"

    @property
    def log(self) -> str:
        return self.log_file.read_text() if self.log_file.is_file() else ""

    @property
    def state(self) -> str:
        return self.fact("JobState")

    @property
    def restarts(self) -> int:
        return int(self.fact("Restarts"))

    def fact(self, name: str) -> str:
        return self.cluster.fact(self.id, name)

    def metrics(self) -> list[dict[str, Any]]:
        path = self.run / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def wait(self, condition: Callable[[], bool], timeout_s: float, what: str) -> float:
        return self.cluster.wait(condition, timeout_s, what, self.log_file)

    def wait_for_step(self, step: int, timeout_s: float = 180) -> float:
        """`step` has been logged by the present start; an ended job is not waited for."""

        def there() -> bool:
            assert self.state in ("PENDING", "RUNNING", "COMPLETING"), self.log[-4000:]
            return any(line["step"] >= step for line in self.metrics())

        return self.wait(there, timeout_s, f"step {step}")

    def wait_for_end(self, timeout_s: float = 180) -> float:
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        return self.wait(lambda: self.state in ends, timeout_s, "end")


@pytest.fixture(scope="session")
def cluster(environment: Callable[..., dict[str, str]]) -> Iterator[Cluster]:
    reason = emulation.why_not()
    if reason:
        pytest.skip(reason)
    # Paths of Unix sockets are short, those of pytest are not.
    folder = Path(tempfile.mkdtemp(prefix="slurm"))
    cluster = Cluster(folder, environment(PYTHON=sys.executable))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
    shutil.rmtree(folder)


@pytest.fixture
def recipe(demo_shards: Path, tmp_path: Path) -> Path:
    """The demo in little, for two or three ranks."""
    path = tmp_path / "recipe.yaml"
    shards = demo_shards / "train"
    path.write_text(
        f"""
        base: demo
        data: {{shards: {shards}, num_videos: 48, num_streams: 12, workers: 1}}
        optim: {{warmup_steps: 3}}
        train: {{total_batch: 12, micro_batch: 12, log_every: 1}}
        """
    )
    return path


@pytest.fixture
def start_job(cluster: Cluster, recipe: Path, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Submits the recipe on two nodes, one rank each; what still runs at the end is cancelled."""
    jobs: list[Job] = []

    def start(*overrides: str, sbatch: tuple[str, ...] = ()) -> Job:
        arguments = [f"--recipe={recipe}", f"--output={tmp_path / 'run'}", *overrides]
        jobs.append(Job(cluster, tmp_path, arguments, "--nodes=2", "--ntasks-per-node=1", *sbatch))
        return jobs[-1]

    yield start
    for job in jobs:
        cluster.call("scancel", job.id, check=False)
