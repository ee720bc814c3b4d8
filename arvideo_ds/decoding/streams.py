"""Generators in processes that can be killed: as processes.py, for results too long to hold.

A process sends one item after another through a pipe and waits where the pipe is full, so what is
under way stays bounded. One that hangs or dies is replaced; what it worked on has failed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from arvideo_ds.decoding.processes import failure
from arvideo_ds.decoding.video import RejectedError
from arvideo_ds.errors import UserError

Function = Callable[[Any], Iterator[Any]]

_POLL_S = 1.0
# Processes that may die before they are ready for their first task.
_MOST_STILLBORN = 3


@dataclass(frozen=True)
class Finished:
    """The end of a task that is done; from a new process: it is ready."""


@dataclass(frozen=True)
class Failed:
    """The end of a task that raised, hung or crashed: a reason to count by, and a message.

    rejected: true of the video (`RejectedError`), and so of every other try.
    """

    reason: str
    message: str
    rejected: bool = False


def stream_all(
    function: Function,
    tasks: Iterable[Any],
    *,
    workers: int,
    timeout_s: float,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Any, Any]]:
    """(task, item) for every item of every task, then (task, `Finished` or `Failed`).

    A task's items come in order; with several workers, tasks come mixed. timeout_s: longest time
    between two items. stop: once true no task is begun, those under way are finished. With
    workers 0 everything happens in this process and nothing can be killed. Errors: `UserError`,
    from a task or where processes do not start; what else a task raises is `Failed`.
    """
    if workers:
        crew = _Crew(function, workers, timeout_s)
        try:
            yield from crew.work(iter(tasks), stop)
        finally:
            crew.dismiss()
        return
    for task in tasks:
        if stop():
            return
        for item in _items(function, task):
            yield task, item


class _Worker:
    def __init__(self, function: Function) -> None:
        # spawn: a forked child would inherit locks of this process's threads.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, function), daemon=True)
        self.process.start()
        theirs.close()
        self.ready = False
        self.task: Any = None
        self.heard = time.monotonic()

    def begin(self, task: Any) -> None:
        self.task, self.heard = task, time.monotonic()
        # One that has just died is found by its pipe's end.
        with contextlib.suppress(OSError):
            self.pipe.send(task)

    def receive(self) -> Any:
        """The next item. Errors: EOFError or OSError when the process is gone."""
        item = self.pipe.recv()
        self.ready, self.heard = True, time.monotonic()
        return item

    def end(self) -> int | None:
        """Make sure that it ends; how it ended by itself, None if it did not."""
        self.process.join(0.1)
        code = self.process.exitcode
        self.process.kill()
        self.process.join()
        self.pipe.close()
        return code


class _Crew:
    """The workers, and who is on what."""

    def __init__(self, function: Function, workers: int, timeout_s: float) -> None:
        self._function, self._timeout_s = function, timeout_s
        self._workers = [_Worker(function) for _ in range(workers)]
        self._stillborn = 0

    def work(self, tasks: Iterator[Any], stop: Callable[[], bool]) -> Iterator[tuple[Any, Any]]:
        more = True
        while True:
            for worker in self._workers:
                more = more and not stop()
                if more and worker.ready and worker.task is None:
                    task = next(tasks, None)
                    more = task is not None
                    if more:
                        worker.begin(task)
            if not more and all(worker.task is None for worker in self._workers):
                return
            yield from self._hear()

    def _hear(self) -> Iterator[tuple[Any, Any]]:
        """What any worker has to say within a moment."""
        speaking = wait([worker.pipe for worker in self._workers], timeout=_POLL_S)
        for number, worker in enumerate(self._workers):
            task, item = worker.task, None
            if worker.pipe in speaking:
                item = self._receive(number, worker)
            elif task is not None and self._is_late(worker):
                message = f"nothing within {self._timeout_s:g} s; its process was killed"
                self._replace(number, worker)
                item = Failed("timeout", message)
            if isinstance(item, UserError):
                raise item
            if isinstance(item, Finished | Failed):
                worker.task = None
            if item is not None and task is not None:
                yield task, item

    def _is_late(self, worker: _Worker) -> bool:
        # While the others' items were dealt with, it may have spoken.
        late = time.monotonic() - worker.heard > self._timeout_s
        return late and not worker.pipe.poll()

    def _receive(self, number: int, worker: _Worker) -> Any:
        try:
            return worker.receive()
        except (EOFError, OSError):
            code = self._replace(number, worker)
            return Failed("crash", f"the decoder's process died (exit code {code})")

    def _replace(self, number: int, worker: _Worker) -> int | None:
        """Errors: `UserError` where new processes die again and again before they are ready."""
        code = worker.end()
        self._stillborn += not worker.ready
        if self._stillborn >= _MOST_STILLBORN:
            raise UserError(
                f"processes that decode die as they start (exit code {code}). Memory may be short: "
                "try fewer --workers; --workers 0 decodes in the main process."
            )
        self._workers[number] = _Worker(self._function)
        return code

    def dismiss(self) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.end()


def _serve(pipe: Connection, function: Function) -> None:
    """The life of a worker: tasks in, items out, until the other end is gone."""
    # Signals go to whole process groups; the main process decides what they mean.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # One thread each: the workers themselves are the parallelism.
    torch.set_num_threads(1)
    try:
        pipe.send(Finished())
        while True:
            for item in _items(function, pipe.recv()):
                pipe.send(item)
    except UserError as error:
        pipe.send(error)
    except (EOFError, OSError):  # nobody listens any more
        return


def _items(function: Function, task: Any) -> Iterator[Any]:
    try:
        yield from function(task)
    except UserError:
        raise
    except Exception as error:  # a decoder's own bug must not stop the other videos
        yield Failed(*failure(error, None), rejected=isinstance(error, RejectedError))
    else:
        yield Finished()
