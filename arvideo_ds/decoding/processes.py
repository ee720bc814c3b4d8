"""Run functions in processes that can be killed, so that a hang or crash costs one task only.

A thread here feeds each process and waits for it. A process that times out or dies is replaced.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from arvideo_ds.decoding.video import RejectedError
from arvideo_ds.errors import UserError

Work = Callable[[Any], Iterator[Any]]
Prepare = Callable[[], object] | None

# Processes are replaced after so many tasks: native decoders leak.
_TASKS_PER_PROCESS = 200
# Calls of `killable_map` per process that run or wait for an earlier result.
_AHEAD = 4
# How often a process may die before it is ready for its first task.
_MAX_START_FAILURES = 3
_JOIN_S = 0.1


@dataclass(frozen=True)
class Finished:
    """The end of a completed task."""


@dataclass(frozen=True)
class Failed:
    """The end of a task that raised, hung or crashed: a reason to count by, and a message.
    rejected: the video itself is at fault (`RejectedError`), so a second try fails too."""

    reason: str
    message: str
    rejected: bool = False


def killable_map(
    function: Callable[..., Any],
    arguments: Iterable[tuple[Any, ...]],
    *,
    workers: int,
    timeout_s: float | None,
    prepare: Prepare = None,
) -> Iterator[Any]:
    """The result of each call, or why it has `Failed`, in order, computed a few calls ahead.
    timeout_s: longest time of a call. prepare: called once in each process, outside the timeout.
    Errors: `UserError` where processes do not start."""
    results: dict[int, Any] = {}
    first = 0
    task = partial(_call, function)
    with contextlib.closing(_Pool(task, workers, timeout_s, prepare, 0)) as pool:
        calls = enumerate(arguments)
        for (number, _), item in pool.items(calls, lambda: _AHEAD * workers - len(results)):
            if number >= first and not isinstance(item, Finished):
                results.setdefault(number, item)
            while first in results:
                yield results.pop(first)
                first += 1


def stream_all(
    function: Work,
    tasks: Iterable[Any],
    *,
    workers: int,
    timeout_s: float,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Any, Any]]:
    """(task, item) for every item of every task, then (task, `Finished` or `Failed`).

    A task's items come in order; with several workers, tasks are interleaved. A process waits until
    its items are taken, which bounds memory. timeout_s: longest time between two items. stop: once
    true no task is started, running ones finish. With workers 0 everything runs in this process and
    nothing can be killed. Errors: `UserError`, from a task or where processes do not start.
    """
    if workers:
        with contextlib.closing(_Pool(function, workers, timeout_s, None, workers)) as pool:
            yield from pool.items(tasks, lambda: 0 if stop() else workers)
        return
    upcoming = iter(tasks)
    while not stop() and (task := next(upcoming, None)) is not None:
        for item in _items(function, task):
            yield task, _checked(item)


def _call(function: Callable[..., Any], arguments: tuple[int, tuple[Any, ...]]) -> Iterator[Any]:
    try:
        yield function(*arguments[1])
    except UserError as error:  # concerns this call only
        raise RejectedError("error", str(error)) from None


def _checked(item: Any) -> Any:
    if isinstance(item, Exception):
        raise item
    return item


class _Pool:
    """Processes, the tasks that wait for one, and their items, of which at most `room` (0: no
    limit) wait to be taken."""

    def __init__(
        self, function: Work, workers: int, timeout_s: float | None, prepare: Prepare, room: int
    ) -> None:
        self.closed = False
        self.lock = threading.Lock()
        self.timeout_s = timeout_s
        self.arguments = function, prepare
        self.tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._items: queue.Queue[tuple[Any, Any]] = queue.Queue(room)
        self._workers = [_Worker(self) for _ in range(workers)]
        # If an error ends the program, it would otherwise wait for processes that ignore SIGTERM.
        atexit.register(self.close)

    def items(self, tasks: Iterable[Any], limit: Callable[[], int]) -> Iterator[tuple[Any, Any]]:
        """(task, item) as of `stream_all`; starts tasks while fewer than `limit()` run."""
        upcoming = iter(tasks)
        running = 0
        while True:
            while running < limit() and (task := next(upcoming, None)) is not None:
                self.tasks.put(task)
                running += 1
            if not running:
                return
            task, item = self._items.get()
            yield task, _checked(item)
            running -= isinstance(item, Finished | Failed)

    def put(self, task: Any, item: Any) -> None:
        """Called in threads: wait until the item fits, or the pool is closed."""
        while not self.closed:
            with contextlib.suppress(queue.Full):
                self._items.put((task, item), timeout=_JOIN_S)
                return

    def close(self) -> None:
        """Kill every process and end the threads."""
        atexit.unregister(self.close)
        with self.lock:  # no process is being started
            self.closed = True
        for worker in self._workers:
            worker.kill()
            self.tasks.put(None)
        for worker in self._workers:
            worker.join()


class _Worker(threading.Thread):
    """A process and the thread that feeds it and waits for it."""

    def __init__(self, pool: _Pool) -> None:
        super().__init__(daemon=True)
        self._pool = pool
        self._process: Any = None
        self._num_tasks = 0
        self._pipe: Connection
        self.start()

    def run(self) -> None:
        while (task := self._pool.tasks.get()) is not None and not self._pool.closed:
            try:
                self._require_process()
                for item in self._answers(task):
                    self._pool.put(task, item)
            except Exception as error:
                self._pool.put(task, error)
        self._end()

    def kill(self) -> None:
        if (process := self._process) is not None:
            process.kill()

    def _answers(self, task: Any) -> Iterator[Any]:
        timeout_s, item = self._pool.timeout_s, None
        try:
            self._pipe.send(task)
            while not isinstance(item, Finished | Failed | Exception):
                if self._pipe.poll(timeout_s):
                    item = self._pipe.recv()
                else:
                    self._end()
                    message = f"no result within {timeout_s:g} s; its process was killed"
                    item = Failed("timeout", message)
                yield item
        except (EOFError, OSError):
            yield Failed("crash", f"the decoder's process died (exit code {self._end()})")

    def _require_process(self) -> None:
        """Errors: `UserError` where new processes die before they are ready."""
        if self._num_tasks % _TASKS_PER_PROCESS == 0:
            self._end()
        self._num_tasks += 1
        code: int | None = None
        for _ in range(_MAX_START_FAILURES):
            if self._process is not None:
                return
            self._start()
            try:
                self._pipe.recv()
                return
            except (EOFError, OSError):
                code = self._end()
        raise UserError(
            f"processes that decode die as they start (exit code {code}). Memory may be short: "
            "try fewer --workers; --workers 0 decodes in the main process. A script of your own "
            'needs `if __name__ == "__main__":` before its work, since they import it.'
        )

    def _start(self) -> None:
        # spawn: a forked child would inherit locks of this process's threads.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        with self._pool.lock:
            if not self._pool.closed:
                arguments = theirs, *self._pool.arguments
                process = context.Process(target=_serve, args=arguments, daemon=True)
                process.start()
                self._process = process
        theirs.close()

    def _end(self) -> int | None:
        """End the process; its exit code, None if it had to be killed."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.join(_JOIN_S)
        code: int | None = process.exitcode
        process.kill()
        process.join()
        self._pipe.close()
        return code


def _serve(pipe: Connection, function: Work, prepare: Prepare) -> None:
    """The main loop of a process: receive tasks, send items, until the pipe closes."""
    # Signals reach whole process groups; only the main process handles them.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if prepare is not None:
        prepare()
    if torch := sys.modules.get("torch"):
        # The processes are the parallelism.
        torch.set_num_threads(1)
    with contextlib.suppress(EOFError, OSError):  # the pipe was closed
        pipe.send(Finished())  # ready
        while True:
            for item in _items(function, pipe.recv()):
                pipe.send(item)


def _items(function: Work, task: Any) -> Iterator[Any]:
    try:
        yield from function(task)
    except UserError as error:
        yield error
    except RejectedError as error:
        yield Failed(error.reason, error.message, rejected=True)
    except Exception as error:  # one video must not stop the others
        yield Failed("error", f"{type(error).__name__}: {error}")
    else:
        yield Finished()
