"""Cells in local processes: all are run, the failed ones are told, cores are shared out."""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arvideo_ds.ablation import pool
from arvideo_ds.ablation.cell import LOG, RESULT, Cell


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


def test_nothing_to_run(cells: Callable[..., list[Cell]]) -> None:
    assert pool.run_cells([], 2) == {}


def test_cores_are_shared_out_evenly() -> None:
    assert pool.shares([0, 1], 2) == [[0], [1]]
    assert pool.shares([0, 2, 4, 6], 1) == [[0, 2, 4, 6]]
    assert pool.shares([0, 2, 4, 6], 2) == [[0, 2], [4, 6]]
    assert pool.shares([3, 5], 3) == [[3], [5], [3]]
