"""Work in processes that can be killed: a decoder that hangs or crashes takes nothing with it.

A thread of this process feeds each of the others and waits for it. Whatever does not answer in time
or dies has failed; its process is killed and replaced, and the next task goes on.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import queue
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from arvideo_ds.decoding.video import RejectedError
from arvideo_ds.errors import UserError

# Processes are replaced after so many tasks: native decoders leak.
_TASKS_PER_PROCESS = 200
# Calls of `killable_map` that wait or run at any time, per process.
_AHEAD = 4
# How often a process may die before it is ready for its first task.
_MOST_STILLBORN = 3
_JOIN_S = 0.1


@dataclass(frozen=True)
class Finished:
    """The end of a task that is done."""


@dataclass(frozen=True)
class Failed:
    """The end of a task that raised, hung or crashed: a reason to count by, and a message.

    rejected: true of the video (`RejectedError`), and so of every other try.
    """

    reason: str
    message: str
    rejected: bool = False


def killable_map(
    function: Callable[..., Any],
    arguments: Iterable[tuple[Any, ...]],
    *,
    workers: int,
    timeout_s: float | None,
    prepare: Callable[[], object] | None = None,
) -> Iterator[Any]:
    """The result of each call, or why it has `Failed`, in their order, a bounded number ahead.

    A call that takes longer than `timeout_s` is killed; `prepare`, called once in each process, is
    outside of it. Errors: `UserError` where processes do not start.
    """
    waiting: deque[Future[Any]] = deque()
    with contextlib.closing(_Crew(partial(_call, function), workers, timeout_s, prepare)) as crew:
        for call in arguments:
            waiting.append(Future())
            crew.begin(call, partial(_set_first, waiting[-1]))
            if len(waiting) >= _AHEAD * workers:
                yield _checked(waiting.popleft().result())
        while waiting:
            yield _checked(waiting.popleft().result())


def stream_all(
    function: Callable[[Any], Iterator[Any]],
    tasks: Iterable[Any],
    *,
    workers: int,
    timeout_s: float,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Any, Any]]:
    """(task, item) for every item of every task, then (task, `Finished` or `Failed`).

    A task's items come in order; with several workers, tasks come mixed. A process waits where its
    items are not taken, so that few are held. timeout_s: longest time between two items. stop: once
    true no task is begun, those under way are finished. With workers 0 everything happens in this
    process and nothing can be killed. Errors: `UserError`, from a task or where processes do not
    start.
    """
    upcoming = iter(tasks)
    if not workers:
        while not stop() and (task := next(upcoming, None)) is not None:
            for item in _items(function, task):
                yield task, _checked(item)
        return
    items: queue.Queue[tuple[Any, Any]] = queue.Queue(workers)
    with contextlib.closing(_Crew(function, workers, timeout_s)) as crew:
        running = 0
        while True:
            while running < workers and not stop() and (task := next(upcoming, None)) is not None:
                crew.begin(task, partial(_put, items, crew, task))
                running += 1
            if not running:
                return
            task, item = items.get()
            yield task, _checked(item)
            running -= isinstance(item, Finished | Failed)


def _call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Iterator[Any]:
    try:
        yield function(*arguments)
    except UserError as error:  # which concerns this call alone
        raise RejectedError("error", str(error)) from None


def _set_first(future: Future[Any], item: Any) -> None:
    """The result of a call, or its failure, is the first item; the second says that it is done."""
    if not future.done():
        future.set_result(item)


def _put(items: queue.Queue[tuple[Any, Any]], crew: _Crew, task: Any, item: Any) -> None:
    taken = False
    while not (taken or crew.closed):
        with contextlib.suppress(queue.Full):
            items.put((task, item), timeout=_JOIN_S)
            taken = True


def _checked(item: Any) -> Any:
    """An item; errors that end everything are raised."""
    if isinstance(item, Exception):
        raise item
    return item


class _Crew:
    """The processes, and the tasks that wait for one."""

    def __init__(
        self,
        function: Callable[[Any], Iterator[Any]],
        workers: int,
        timeout_s: float | None,
        prepare: Callable[[], object] | None = None,
    ) -> None:
        self.closed = False
        self.lock = threading.Lock()
        self.timeout_s = timeout_s
        self.arguments = function, prepare
        self.tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._workers = [_Worker(self) for _ in range(workers)]
        # Where an error ends the program in the middle of a map: else it would wait for processes
        # that ignore SIGTERM.
        atexit.register(self.close)

    def begin(self, task: Any, take: Callable[[Any], None]) -> None:
        """Work on a task as soon as a process is free; `take`, called in a thread, gets its items:
        the function's, and then `Finished`, `Failed` or an exception that ends everything."""
        self.tasks.put((task, take))

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
    """A process, and the thread of this one that feeds it and waits for it."""

    def __init__(self, crew: _Crew) -> None:
        super().__init__(daemon=True)
        self._crew = crew
        self._process: Any = None
        self._num_tasks = 0
        self._pipe: Connection
        self.start()

    def run(self) -> None:
        while (begun := self._crew.tasks.get()) is not None and not self._crew.closed:
            task, take = begun
            try:
                self._require_process()
                for item in self._answers(task):
                    take(item)
            except Exception as error:
                take(error)
        self._end()

    def kill(self) -> None:
        if (process := self._process) is not None:
            process.kill()

    def _answers(self, task: Any) -> Iterator[Any]:
        """What the process sends of a task."""
        timeout_s, item = self._crew.timeout_s, None
        try:
            self._pipe.send(task)
            while not isinstance(item, Finished | Failed | Exception):
                if not self._pipe.poll(timeout_s):
                    self._end()
                    item = Failed(
                        "timeout", f"no result within {timeout_s:g} s; its process was killed"
                    )
                else:
                    item = self._pipe.recv()
                yield item
        except (EOFError, OSError):
            yield Failed("crash", f"the decoder's process died (exit code {self._end()})")

    def _require_process(self) -> None:
        """Errors: `UserError` where new processes die before they are ready."""
        if self._num_tasks % _TASKS_PER_PROCESS == 0:
            self._end()
        self._num_tasks += 1
        code: int | None = None
        for _ in range(_MOST_STILLBORN):
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
            "try fewer --workers; --workers 0 decodes in the main process."
        )

    def _start(self) -> None:
        # spawn: a forked child would inherit locks of this process's threads.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        with self._crew.lock:
            if not self._crew.closed:
                process = context.Process(
                    target=_serve, args=(theirs, *self._crew.arguments), daemon=True
                )
                process.start()
                self._process = process
        theirs.close()

    def _end(self) -> int | None:
        """Make sure that the process ends; how it ended by itself, None if it did not."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.join(_JOIN_S)
        code: int | None = process.exitcode
        process.kill()
        process.join()
        self._pipe.close()
        return code


def _serve(
    pipe: Connection,
    function: Callable[[Any], Iterator[Any]],
    prepare: Callable[[], object] | None,
) -> None:
    """The life of a process: tasks in, items out, until the pipe ends."""
    # Signals go to whole process groups; the main process decides what they mean.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if prepare is not None:
        prepare()
    if torch := sys.modules.get("torch"):
        # One thread each: the processes themselves are the parallelism.
        torch.set_num_threads(1)
    with contextlib.suppress(EOFError, OSError):  # nobody listens any more
        pipe.send(Finished())  # ready
        while True:
            for item in _items(function, pipe.recv()):
                pipe.send(item)


def _items(function: Callable[[Any], Iterator[Any]], task: Any) -> Iterator[Any]:
    try:
        yield from function(task)
    except UserError as error:
        yield error
    except RejectedError as error:
        yield Failed(error.reason, error.message, rejected=True)
    except Exception as error:  # a decoder's own bug must not stop the other videos
        yield Failed("error", f"{type(error).__name__}: {error}")
    else:
        yield Finished()
