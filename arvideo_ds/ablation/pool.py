"""Cells in local processes, `jobs` at a time, each on its share of the cores.

Every cell has its own process; a fork server imports torch and DeepSpeed once. One signal (Ctrl-C,
TERM, USR1, USR2) lets the running cells save, and ends the command.
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


def run_cells(
    cells: Sequence[Cell], jobs: int, log: Callable[[str], None] = print
) -> dict[str, str]:
    """Run the cells in order; returns name -> reason of the failed cells.

    Raises KeyboardInterrupt after a signal, once the running cells have saved.
    """
    failed: dict[str, str] = {}
    waiting, started, done = list(cells), time.monotonic(), 0
    # By the sentinel of the process.
    running: dict[Any, tuple[BaseProcess, Cell, int, float]] = {}
    # A signal makes the pipe readable, and is handled where every started cell is in `running`.
    interrupted = False
    signalled, wake = os.pipe()
    before = {n: signal.signal(n, lambda *_: os.write(wake, b"!")) for n in SIGNALS}
    try:
        while waiting or running:
            free = [s for s in range(jobs) if s not in {slot for *_, slot, _ in running.values()}]
            for slot in free[: len(waiting)]:
                process, cell = _start(waiting[0], slot, jobs), waiting.pop(0)
                running[process.sentinel] = (process, cell, slot, time.monotonic())
            ready = connection.wait([*running, signalled])
            if signalled in ready:
                interrupted = True
                log(f"interrupted: {len(running)} running cell(s) save; the same command resumes")
                processes = [process for process, *_ in running.values()]
                for process in processes:
                    process.terminate()
                for process in processes:
                    process.join()
                raise KeyboardInterrupt
            for sentinel in ready:
                process, cell, _, since = running.pop(sentinel)
                process.join()
                done += 1
                if process.exitcode or cell.result() is None:
                    failed[cell.name] = _reason(cell, process.exitcode)
                now, outcome = time.monotonic(), _outcome(cell, failed)
                left = timedelta(seconds=round((now - started) / done * (len(cells) - done)))
                progress = f"{done}/{len(cells)} {cell.name}"
                log(f"{progress}: {outcome}; {now - since:.0f} s; left {left}")
    finally:
        for number, handler in before.items():
            # After an interruption, further signals must not change the exit code.
            signal.signal(number, signal.SIG_IGN if interrupted else handler)
        os.close(signalled)
        os.close(wake)
    return failed


def shares(cores: Sequence[int], jobs: int) -> list[list[int]]:
    """The cores of each job: equal shares; with more jobs than cores, jobs share a core."""
    size = max(1, len(cores) // jobs)
    return [[cores[(job * size + i) % len(cores)] for i in range(size)] for job in range(jobs)]


def _start(cell: Cell, slot: int, jobs: int) -> BaseProcess:
    has_gpu = Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists()
    # A process that has initialised CUDA must not be forked; importing DeepSpeed may do that.
    context: Any = multiprocessing.get_context("spawn" if has_gpu else "forkserver")
    if not has_gpu:
        # Without it DeepSpeed searches for accelerators and logs that there are none.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        context.set_forkserver_preload(_PRELOADED)
    cores = shares(available_cores(), jobs)[slot]
    arguments = (cell, cores, slot if has_gpu else None)
    process: BaseProcess = context.Process(target=_child, args=arguments)
    process.start()
    return process


def _child(cell: Cell, cores: list[int], gpu_slot: int | None) -> None:
    # The training loop handles signals itself; before and after it, ending loses nothing.
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
    """Make one of the command's visible GPUs visible to this process, round robin."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]


def _reason(cell: Cell, code: int | None) -> str:
    """The last line of a failed cell's log."""
    lines = [line for line in (cell.folder / LOG).read_text(errors="replace").splitlines() if line]
    last = lines[-1].strip()[:300] if lines else "no output"
    return f"{last} (exit code {code}; {cell.folder / LOG})"


def _outcome(cell: Cell, failed: dict[str, str]) -> str:
    if cell.name in failed:
        return f"FAILED: {failed[cell.name]}"
    return ", ".join(f"{name} {value:.1f} %" for name, value in cell.figures().items())
