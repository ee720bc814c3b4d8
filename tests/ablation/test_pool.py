"""Cells in local processes: all are run, the failed ones are told, cores are shared out."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arvideo_ds.ablation import pool
from arvideo_ds.ablation.cell import LOG, RESULT, Cell
from arvideo_ds.train.signals import SIGNALS


def pretend(cell: Cell, slot: int) -> None:
    """What a cell's process leaves behind, without training anything."""
    cell.folder.mkdir(parents=True)
    (cell.folder / LOG).write_text(f"slot {slot}\nerror: it broke\n\n")
    if cell.variant == "bad":
        sys.exit(2)
    if cell.variant != "silent":
        (cell.folder / RESULT).write_text(json.dumps({"linear": 50.0, "knn": 40.0}))


@pytest.fixture
def cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Cell]]:
    def start(cell: Cell, slot: int, jobs: int) -> Any:
        process = multiprocessing.get_context("fork").Process(target=pretend, args=(cell, slot))
        process.start()
        return process

    monkeypatch.setattr(pool, "_start", start)

    def make(*names: str) -> list[Cell]:
        return [Cell(tmp_path / f"{n}-seed0", n, "demo", (), 0, None, tmp_path) for n in names]

    return make


@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_a_failed_cell_is_told_and_the_others_are_run(
    cells: Callable[..., list[Cell]], jobs: int
) -> None:
    made, lines = cells("a", "bad", "b", "silent", "c"), list[str]()
    failed = pool.run_cells(made, jobs, lines.append)
    assert set(failed) == {"bad-seed0", "silent-seed0"}
    assert failed["bad-seed0"].startswith("error: it broke (exit code 2; ")
    assert "(exit code 0; " in failed["silent-seed0"]
    assert [cell.variant for cell in made if cell.result()] == ["a", "b", "c"]
    assert len(lines) == 5
    assert lines[-1].startswith("5/5 ")
    assert lines[-1].endswith("left 0:00:00")
    assert sum("FAILED" in line for line in lines) == 2
    slots = {(cell.folder / LOG).read_text().splitlines()[0] for cell in made}
    assert slots <= {f"slot {slot}" for slot in range(jobs)}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_lets_the_running_cells_end_and_later_ones_change_nothing(
    number: int, cells: Callable[..., list[Cell]]
) -> None:
    """Also one that comes while a cell is being started."""
    before = {each: signal.getsignal(each) for each in SIGNALS}
    begun: list[Any] = []
    start = pool._start

    def start_and_signal(cell: Cell, slot: int, jobs: int) -> Any:
        os.kill(os.getpid(), number)
        begun.append(start(cell, slot, jobs))
        return begun[-1]

    pool._start = start_and_signal  # the fixture's monkeypatch takes it back
    try:
        with pytest.raises(KeyboardInterrupt):
            pool.run_cells(cells("a", "b", "c"), 1, lambda line: None)
        for each in SIGNALS:
            os.kill(os.getpid(), each)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert len(begun) == 1
    assert begun[0].exitcode is not None


def test_nothing_to_run(cells: Callable[..., list[Cell]]) -> None:
    assert pool.run_cells([], 2) == {}


def test_cores_are_shared_out_evenly() -> None:
    assert pool.shares([0, 1], 2) == [[0], [1]]
    assert pool.shares([0, 2, 4, 6], 1) == [[0, 2, 4, 6]]
    assert pool.shares([0, 2, 4, 6], 2) == [[0, 2], [4, 6]]
    assert pool.shares([3, 5], 3) == [[3], [5], [3]]
