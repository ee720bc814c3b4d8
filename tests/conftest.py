"""Shared by all tests: small recipes, real shards made on the spot, and scripts run for real."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import settings

from arvideo_ds.config import DetectRecipe, FinetuneRecipe, PretrainRecipe
from arvideo_ds.config.load import validate
from arvideo_ds.files.locks import lock
from arvideo_ds.shards.demo_set import DEMO
from arvideo_ds.shards.synthetic import ensure_shards
from arvideo_ds.train.signals import SIGNALS
from tests import warm_start
from tests.ava_set import AvaSet, make_ava
from tests.epic_set import make_epic
from tests.textured_set import make_textured

ROOT = Path(__file__).parent.parent
# Real videos of the developers' machines; the project passes without them.
REAL_VIDEOS = ROOT.parent / "shared" / "data"


# Files of minutes, longest first. `make test` starts files in this order: one that is started late
# would end long after the others, alone on its worker.
LONGEST = [
    "train/test_training.py",
    "slurm/test_jobs.py",
    "fakecuda/test_fakecuda.py",
    "train/test_resume.py",
    "evaluation/test_extraction.py",
    "long_video/test_scoring_pass.py",
    "data/test_real_files.py",
    "ablation/test_command.py",
    "train/test_detection.py",
    "train/test_faults.py",
    "test_docs.py",
    "engine/test_compile.py",
    "engine/test_model_states.py",
    "engine/test_matrix.py",
    "engine/test_sequence.py",
    "shards/test_shard_writer.py",
    "gpu/test_check.py",
    "train/test_finetuning.py",
    "train/test_phases.py",
    "train/test_signalled_runs.py",
    "long_video/test_tokenizer_run.py",
    "slurm/test_shards.py",
    "slurm/test_ablate.py",
    "exports/test_exports.py",
    "models/test_videomae.py",
    "shards/test_large_manifest.py",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {Path(__file__).parent / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


# The same examples in every run: what one sees, all can repeat. To look for others:
# pytest --hypothesis-profile=default. No deadline: a shared machine may pause in any of them.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _own_process_state() -> Iterator[None]:
    """Commands called in this process decide what signals do, and set RANK and the like.

    The next test starts afresh. They also take all cores, which with other tests beside takes many
    times as long as one.
    """
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    torch.set_num_threads(1)
    with mock.patch.dict(os.environ):
        yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def real_videos() -> Path:
    if not REAL_VIDEOS.is_dir():
        pytest.skip("no ../shared/data beside the checkout")
    return REAL_VIDEOS


@pytest.fixture(scope="session")
def demo_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 48 demo videos (real H.264 files), train and test; made once for all workers."""
    folder = folder_of_all_workers(tmp_path_factory) / "demo"
    ensure_shards(replace(DEMO, splits={"train": 48, "test": 48}), folder)
    return folder


def folder_of_all_workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For what is made once: whoever makes it locks its folder, the others wait."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def epic_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of shards with verb and noun, `train` and `test`, 24 and 8 samples."""
    folder = folder_of_all_workers(tmp_path_factory) / "epic"
    with lock(folder, wait=True):
        for split, films in (("train", 12), ("test", 4)):
            make_epic(folder, split, films)
    return folder


@pytest.fixture(scope="session")
def ava(tmp_path_factory: pytest.TempPathFactory) -> AvaSet:
    """Two films of moving squares with boxes and actions, as shards: 16 keyframes."""
    folder = folder_of_all_workers(tmp_path_factory) / "ava"
    with lock(folder, wait=True):
        return make_ava(folder, "train", seconds=10)


@pytest.fixture(scope="session")
def textured_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of nine videos of several shapes and lengths, every token its own."""
    folder = folder_of_all_workers(tmp_path_factory) / "textured"
    with lock(folder, wait=True):
        return make_textured(folder)


@pytest.fixture
def ava_recipe(ava: AvaSet) -> Callable[..., DetectRecipe]:
    """A small recipe of detection on `ava`; sections given are laid over it."""

    def make(**sections: dict[str, object]) -> DetectRecipe:
        files = {"annotations": str(ava.annotations), "detections": str(ava.detections)}
        tree: dict[str, object] = {
            "task": "detect",
            "model": {"size": "tiny"},
            "data": {
                "shards": str(ava.shards),
                "frames": 8,
                "size": 32,
                "stride": 1,
                "crop_scales": [1.0, 0.875],
                "flip": True,
                "num_streams": 4,
            },
            "train": {"max_steps": 4, "total_batch": 4, "micro_batch": 4, "precision": "fp32"},
            "detect": {"num_actions": 3, **files},
            "evaluation": {
                "shards": str(ava.shards),
                "action_list": str(ava.action_list),
                "views": 2,
                **files,
            },
        }
        for name, values in sections.items():
            tree[name] = {**tree.get(name, {}), **values}  # type: ignore[dict-item]
        return validate(tree, "test recipe", DetectRecipe)

    return make


@pytest.fixture
def tiny() -> Callable[..., PretrainRecipe]:
    """A small recipe; sections given as keyword arguments are laid over it."""

    def make(**sections: dict[str, object]) -> PretrainRecipe:
        tree: dict[str, dict[str, object]] = {
            "model": {"size": "tiny"},
            "objective": {"cluster": [2, 4, 4]},
            "decoder": {},
            "data": {
                "frames": 8,
                "size": 32,
                "stride": 1,
                "num_videos": 48,
                "num_streams": 12,
                "workers": 0,
            },
            "optim": {"warmup_steps": 2, "base_lr": 4e-3, "warmup_lr": 3.2e-5, "min_lr": 3.2e-4},
            "train": {
                "max_steps": 4,
                "total_batch": 8,
                "micro_batch": 8,
                "precision": "fp32",
                "log_every": 1,
            },
        }
        for name, values in sections.items():
            below = {} if "name" in values else tree.get(name, {})  # another objective
            tree[name] = {**below, **values}
        return validate(tree, "test recipe")

    return make


@pytest.fixture
def tiny_finetune() -> Callable[..., FinetuneRecipe]:
    """A small fine-tuning recipe; sections given as keyword arguments are laid over it."""

    def make(**sections: dict[str, object]) -> FinetuneRecipe:
        tree: dict[str, dict[str, object]] = {
            "model": {"size": "tiny"},
            "data": {"frames": 8, "size": 32, "stride": 1, "num_videos": 48, "num_streams": 12},
            "train": {
                "max_steps": 4,
                "total_batch": 8,
                "micro_batch": 8,
                "precision": "fp32",
                "log_every": 1,
            },
        }
        for name, values in sections.items():
            tree[name] = {**tree.get(name, {}), **values}
        return validate({"task": "finetune", **tree}, "test recipe", FinetuneRecipe)

    return make


@pytest.fixture
def run() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_command`, for tests that start the project's commands."""
    return run_command


@pytest.fixture(scope="session")
def environment() -> Callable[..., dict[str, str]]:
    """Builds the environment of a subprocess of the project."""
    return command_environment


def run_command(
    *command: str | Path, cwd: Path = ROOT, timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command of the project with this interpreter's environment; never raises."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=command_environment(**environment),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def run_script(
    script: str | Path,
    *arguments: str | Path,
    ranks: int = 1,
    cores: int | None = None,
    cwd: Path = ROOT,
    timeout: float = 300,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """`run_command` for a script that imports torch, which is imported already: warm_start.py."""
    command = [str(ROOT / script), *arguments]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = warm_start.start(
            command,
            cwd=cwd,
            env=command_environment(**environment),
            ranks=ranks,
            cores=cores,
            stdout=out.fileno(),
            stderr=err.fileno(),
        )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.show_where_it_hangs()
            out.seek(0)
            err.seek(0)
            pytest.fail(f"{command} has not ended in {timeout} s\n{out.read()}\n{err.read()}")
        finally:
            process.kill_session()
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(command, code, out.read(), err.read())


def count_parameters(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def free_port() -> int:
    """For ranks of one test to meet at, which others may run beside."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def command_environment(**extra: str) -> dict[str, str]:
    own_bin = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "PATH": own_bin + os.pathsep + os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "DS_ACCELERATOR": "cpu",
        # Threads that wait by spinning take the cores from the other processes of the tests.
        "OMP_WAIT_POLICY": "PASSIVE",
        **extra,
    }
