"""What the processes of test_processes.py do; it imports little, so that they start fast."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

from arvideo_ds.decoding.video import RejectedError
from arvideo_ds.errors import UserError


def count(task: tuple[str, int]) -> Iterator[int]:
    what, number = task
    if what == "later":
        time.sleep(0.5)
    yield from range(number)
    if what == "reject":
        raise RejectedError("short", "too short")
    if what == "raise":
        raise ZeroDivisionError("a bug")
    if what == "wrong":
        raise UserError("put it right.")
    if what == "die":
        os._exit(7)
    if what == "hang":
        time.sleep(1000)


def answer(what: str, number: int) -> tuple[int, int]:
    if what == "late":
        time.sleep(0.3)
    if what == "raise":
        raise UserError("put it right.")
    if what == "die":
        os._exit(7)
    if what == "hang":
        time.sleep(1000)
    return number, os.getpid()


class DiesAsItStarts:
    def __call__(self, task: int) -> Iterator[int]:
        yield task

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (3,)
