"""Calls in processes that can be killed: a decoder that hangs or crashes takes nothing with it."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pebble

from arvideo_ds.decoding.video import RejectedError

# Processes are replaced after so many calls: native decoders leak.
_CALLS_PER_PROCESS = 200
# Calls that wait or run at any time, per process.
_AHEAD = 4


def killable_map(
    function: Callable[..., Any],
    arguments: Iterable[tuple[Any, ...]],
    *,
    workers: int,
    timeout_s: float | None,
    prepare: Callable[[], object] | None = None,
) -> Iterator[concurrent.futures.Future[Any]]:
    """One future per tuple of arguments, in their order, a bounded number ahead.

    A call that takes longer than `timeout_s` is killed; `prepare`, called once in each process, is
    outside of it. What a future's `result()` may raise beside the function's own errors is for
    `failure` to put in words. When a map ends, it ends every process that was started since it
    began: one may stand within another, and none may outlive the one around it.
    """
    waiting: deque[concurrent.futures.Future[Any]] = deque()
    others = set(multiprocessing.active_children())
    # spawn: a forked child would inherit locks of this process's threads.
    pool = pebble.ProcessPool(
        max_workers=workers,
        max_tasks=_CALLS_PER_PROCESS,
        initializer=prepare,
        context=multiprocessing.get_context("spawn"),
    )
    try:
        upcoming = iter(arguments)
        while True:
            while len(waiting) < _AHEAD * workers and (call := next(upcoming, None)) is not None:
                waiting.append(pool.schedule(function, args=call, timeout=timeout_s))
            if not waiting:
                break
            yield waiting.popleft()
    finally:
        pool.stop()
        # One that is only starting would print a traceback: pebble takes its locks away first.
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        pool.join()


def failure(error: Exception, timeout_s: float | None) -> tuple[str, str]:
    """What a future raised, as a reason to count by and a message."""
    if isinstance(error, RejectedError):
        return error.reason, error.message
    if isinstance(error, concurrent.futures.TimeoutError) and timeout_s is not None:
        return "timeout", f"no result within {timeout_s:g} s; its process was killed"
    if isinstance(error, pebble.ProcessExpired):
        return "crash", f"the decoder's process died ({error})"
    return "error", f"{type(error).__name__}: {error}"
