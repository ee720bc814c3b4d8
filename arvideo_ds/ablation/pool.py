"""Cells in local processes, `jobs` at a time, each on its share of the cores.

Every cell has a process of its own, so that none spoils another; torch and DeepSpeed are imported
once, by a fork server. One signal (Ctrl-C, TERM, USR1, USR2) lets the running cells save and ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from arvideo_ds.ablation.cell import LOG, Cell, run_cell
from arvideo_ds.errors import command
from arvideo_ds.host import available_cores, bind_to_cores
from arvideo_ds.train.signals import SIGNALS, end_on_signals

_PRELOADED = ["arvideo_ds.train.run", "arvideo_ds.evaluation.features"]
Say = Callable[[str], None]


def run_cells(cells: Sequence[Cell], jobs: int, say: Say = print) -> dict[str, str]:
    """Run the cells in their order; name -> reason of those that failed.

    Raises KeyboardInterrupt once the running cells have saved, after a signal.
    """
    failed: dict[str, str] = {}
    waiting, started, done = list(cells), time.monotonic(), 0
    # By the sentinel of the process.
    running: dict[Any, tuple[BaseProcess, Cell, int, float]] = {}
    # A signal makes this readable, at a place where every started cell is known.
    interrupted = False
    asked, ask = os.pipe()
    before = {n: signal.signal(n, lambda *_: os.write(ask, b"!")) for n in SIGNALS}
    try:
        while waiting or running:
            free = [s for s in range(jobs) if s not in {slot for *_, slot, _ in running.values()}]
            for slot in free[: len(waiting)]:
                process, cell = _start(waiting[0], slot, jobs), waiting.pop(0)
                running[process.sentinel] = (process, cell, slot, time.monotonic())
            ready = connection.wait([*running, asked])
            if asked in ready:
                interrupted = True
                _end([process for process, *_ in running.values()], say)
                raise KeyboardInterrupt
            for sentinel in ready:
                process, cell, _, since = running.pop(sentinel)
                process.join()
                done += 1
                if process.exitcode or cell.result() is None:
                    failed[cell.name] = _reason(cell, process.exitcode)
                left_s = (time.monotonic() - started) / done * (len(cells) - done)
                say(_line(cell, failed, done, len(cells), time.monotonic() - since, left_s))
    finally:
        for number, handler in before.items():
            # After an interruption the exit code is decided.
            signal.signal(number, signal.SIG_IGN if interrupted else handler)
        os.close(asked)
        os.close(ask)
    return failed


def _end(running: Sequence[BaseProcess], say: Say) -> None:
    """Let the running cells save, and wait for them."""
    say(f"interrupted: {len(running)} running cell(s) save; the same command goes on")
    for process in running:
        process.terminate()
    for process in running:
        process.join()


def shares(cores: Sequence[int], jobs: int) -> list[list[int]]:
    """The cores of each job: equal shares, or one core for several jobs where these are more."""
    size = max(1, len(cores) // jobs)
    return [[cores[(job * size + i) % len(cores)] for i in range(size)] for job in range(jobs)]


def _start(cell: Cell, slot: int, jobs: int) -> BaseProcess:
    has_gpu = Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists()
    # A process that has talked to CUDA must not be forked, and an import of DeepSpeed may.
    context: Any = multiprocessing.get_context("spawn" if has_gpu else "forkserver")
    if not has_gpu:
        # DeepSpeed would look for accelerators and say in the terminal that it found none.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        context.set_forkserver_preload(_PRELOADED)
    cores = shares(available_cores(), jobs)[slot]
    process: BaseProcess = context.Process(
        target=_child, args=(cell, cores, slot if has_gpu else None)
    )
    process.start()
    return process


def _child(cell: Cell, cores: list[int], gpu_slot: int | None) -> None:
    # While it trains, the run takes signals itself; before and after, nothing is lost by ending.
    end_on_signals()
    cell.folder.mkdir(parents=True, exist_ok=True)
    with (cell.folder / LOG).open("ab") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    bind_to_cores(cores)
    os.environ["OMP_NUM_THREADS"] = str(len(cores))
    if gpu_slot is not None:
        _take_gpu(gpu_slot)
    import torch

    torch.set_num_threads(len(cores))
    sys.exit(command(lambda: run_cell(cell))())


def _take_gpu(slot: int) -> None:
    """Show this process one GPU of those that the command was shown, in turn."""
    import torch

    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = shown.split(",") if shown else [str(i) for i in range(torch.cuda.device_count())]
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]


def _reason(cell: Cell, code: int | None) -> str:
    """The last words of a failed cell."""
    lines = [line for line in (cell.folder / LOG).read_text(errors="replace").splitlines() if line]
    last = lines[-1].strip()[:300] if lines else "no word"
    return f"{last} (exit code {code}; {cell.folder / LOG})"


def _line(
    cell: Cell, failed: dict[str, str], done: int, total: int, took_s: float, left_s: float
) -> str:
    if cell.name in failed:
        outcome = f"FAILED: {failed[cell.name]}"
    else:
        outcome = ", ".join(f"{name} {value:.1f} %" for name, value in cell.figures().items())
    left = timedelta(seconds=round(left_s))
    return f"{done}/{total} {cell.name}: {outcome}; {took_s:.0f} s; left {left}"
