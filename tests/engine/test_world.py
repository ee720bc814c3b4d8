"""Which GPU and how many cores a rank takes, and what it says when the ranks cannot meet."""

from __future__ import annotations

import logging.handlers
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from deepspeed.accelerator import real_accelerator

from arvideo_ds.engine import world
from arvideo_ds.errors import UserError

DOCTOR = Path(__file__).parent.parent.parent / "scripts" / "doctor.py"


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes torch show so many GPUs."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.delenv("SLURM_GPUS_ON_NODE", raising=False)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    return lambda count: monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_a_rank_takes_the_gpu_of_its_number(gpus: Callable[[int], None]) -> None:
    gpus(8)
    assert world._device(3, 8, "srun") == torch.device("cuda", 3)
    assert os.environ["LOCAL_RANK"] == "3"


@pytest.mark.parametrize("on_node", [None, "4"])
def test_a_task_that_is_shown_its_own_gpu_takes_that(
    gpus: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, on_node: str | None
) -> None:
    gpus(1)
    if on_node:
        monkeypatch.setenv("SLURM_GPUS_ON_NODE", on_node)
    assert world._device(3, 4, "srun") == torch.device("cuda", 0)
    # DeepSpeed reads it there.
    assert os.environ["LOCAL_RANK"] == "0"


def test_tasks_that_would_share_a_gpu_are_refused(
    gpus: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(1)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "1")
    with pytest.raises(UserError, match=r"rank 3 is process 3 of .* shows 1 GPU"):
        world._device(3, 4, "srun")
    with pytest.raises(UserError, match="shows 1 GPU"):
        world._device(3, 4, "torchrun")


def test_cores_are_shared_unless_slurm_bound_each_task_to_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def cores(seen: int, on_node: int | None) -> int:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(seen)), raising=False)
        monkeypatch.delenv("SLURM_CPUS_ON_NODE", raising=False)
        if on_node:
            monkeypatch.setenv("SLURM_CPUS_ON_NODE", str(on_node))
        return world._cores(8)

    assert cores(96, None) == cores(96, 96) == 12
    assert cores(12, 96) == 12
    assert cores(4, None) == 1


def test_a_host_that_does_not_resolve_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(host: str, port: int | None) -> None:
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(world, "_RESOLVE_PAUSE_S", 0.0)
    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(UserError, match="cannot resolve node9, the host of rank 0"):
        world._require_resolvable("node9")


@pytest.mark.dist
def test_a_port_that_is_taken_is_no_traceback(
    run: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        rank = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
        done = run(sys.executable, DOCTOR, f"--output={tmp_path}", timeout=60, **where, **rank)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"could not meet the others at 127.0.0.1:{port}" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.slow
def test_the_flight_recorder_writes_into_the_run(tmp_path: Path) -> None:
    """torch's own recorder, on gloo, in a process with these variables."""
    program = (
        "import torch, torch.distributed as dist; from torch._C import _distributed_c10d as c10d\n"
        "dist.init_process_group('gloo', init_method='tcp://127.0.0.1:0', rank=0, world_size=1)\n"
        "dist.all_reduce(torch.ones(1)); c10d._dump_fr_trace_file(0)"
    )
    if not hasattr(torch._C._distributed_c10d, "_dump_fr_trace_file"):
        pytest.skip("this torch writes its records only when a collective of NCCL times out")
    environment = {**os.environ, **world._recording(tmp_path)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=60)
    assert [path.name for path in tmp_path.iterdir()] == ["rank_0"]


def test_only_a_gpu_rounds_to_tf32_and_only_if_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    for device in ("cpu", "cuda"):
        for allowed in (True, False):
            world.use_tf32(torch.device(device), allowed)
    assert chosen == ["high", "highest"]


def test_a_cpu_without_avx512_computes_bf16_in_software() -> None:
    facts = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not facts.is_file():
        pytest.skip("the flags of this machine's CPU are not known here")
    assert world.emulates_bf16(torch.device("cpu")) == ("avx512bw" not in facts.read_text().split())
    assert not world.emulates_bf16(torch.device("cuda"))


def test_deepspeeds_notice_of_the_cpu_is_not_printed_and_its_warnings_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The header of a run names its device; the notice came before the lines of every command."""
    printed = logging.handlers.BufferingHandler(100)
    deepspeed = logging.getLogger("DeepSpeed")
    monkeypatch.setattr(deepspeed, "handlers", [printed])
    monkeypatch.setattr(real_accelerator, "ds_accelerator", None)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    real_accelerator.get_accelerator()
    deepspeed.warning("the memory is full")
    assert [record.getMessage() for record in printed.buffer] == ["the memory is full"]
