"""Systems without core masks, /proc and /dev/shm, as macOS: the same functions run and say less."""

from __future__ import annotations

import ast
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from arvideo_ds import host
from arvideo_ds.ablation import pool
from arvideo_ds.config import PretrainRecipe
from arvideo_ds.data.loader import TrainLoader
from arvideo_ds.doctor import machine
from arvideo_ds.engine import world
from arvideo_ds.planning.plan import make_plan
from arvideo_ds.shards.manifest import ShardSet
from tests.conftest import ROOT

SOURCES = [
    path for room in ("arvideo_ds", "scripts", "data_tools") for path in (ROOT / room).rglob("*.py")
]
# What exists on Linux alone, or means something else elsewhere.
LINUX_ONLY = {"sched_getaffinity", "sched_setaffinity", "posix_fadvise", "ru_maxrss"}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_cpu_seconds_are_those_that_the_process_used() -> None:
    used = -time.process_time()
    measured = -host.cpu_seconds(os.getpid())
    while used + time.process_time() < 0.2:
        pass
    measured += host.cpu_seconds(os.getpid())
    assert abs(measured - (used + time.process_time())) < 0.05
    assert host.cpu_seconds(2**30) == 0


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """This machine without what macOS lacks."""
    for name in ("sched_getaffinity", "sched_setaffinity"):
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setattr(host, "_PROC", tmp_path / "no-proc")
    monkeypatch.setattr(machine, "_SHM", tmp_path / "no-shm")
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path / "no-cgroups")
    monkeypatch.setattr(sys, "platform", "darwin")


def test_cores_are_counted_without_a_mask(bare: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert host.available_cores() == [0, 1, 2]
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert host.available_cores() == [0]
    host.bind_to_cores([0])


def test_a_mask_counts_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5, 2}, raising=False)
    assert host.available_cores() == [2, 5]


def test_memory_that_the_system_does_not_tell_is_unknown_and_no_error(bare: None) -> None:
    assert host.resident_bytes(os.getpid()) == host.proportional_bytes(os.getpid()) == 0
    assert host.available_memory() is None
    assert host.cpu_name()


def test_the_peak_is_bytes_on_both_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    """ru_maxrss counts KiB on Linux and bytes on macOS."""
    linux = host.peak_resident_bytes()
    assert 2**24 < linux < 2**40
    monkeypatch.setattr(sys, "platform", "darwin")
    assert host.peak_resident_bytes() == pytest.approx(linux / 1024, rel=0.1)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_this_process_is_what_proc_says() -> None:
    resident, shared = host.resident_bytes(os.getpid()), host.proportional_bytes(os.getpid())
    assert 2**24 < shared <= 1.05 * resident
    assert (host.available_memory() or 0) > 2**20


def test_the_doctor_finds_nothing_wrong_with_what_is_not_there(bare: None, tmp_path: Path) -> None:
    findings = {finding.about: finding for finding in machine.examine(tmp_path)}
    assert findings["memory"].level == findings["/dev/shm"].level == "ok"
    assert findings["cores"].level == "ok"


def test_a_rank_its_loader_and_a_cell_find_their_cores(
    bare: None, tiny: Callable[..., PretrainRecipe], demo_shards: Path
) -> None:
    assert world._cores(1) == len(host.available_cores())
    assert pool.shares(host.available_cores(), 1) == [host.available_cores()]
    shards, recipe = ShardSet(str(demo_shards / "train")), tiny()
    plan = make_plan(recipe, world_size=1, num_videos=shards.num_samples)
    loader = TrainLoader(
        shards, recipe, plan, rank=0, first_step=0, num_workers=0, pin_memory=False, left_out={}
    )
    batches = iter(loader)
    assert next(batches).valid.all()
    assert loader.workers_resident_gib() == 0


def test_linux_is_asked_in_one_module() -> None:
    """Else the demo ends in an AttributeError on other systems."""
    using = {
        path.name
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Attribute) and node.attr in LINUX_ONLY)
        or (isinstance(node, ast.Constant) and str(node.value).startswith("/proc"))
    }
    # The doctor looks up this process's cgroup, and reads nothing where there is none.
    assert using <= {"host.py", "machine.py"}
