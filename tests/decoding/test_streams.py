"""Streams from processes: order, and what hangs, dies or raises costs one task only."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest

from arvideo_ds.decoding.streams import Failed, Finished, stream_all
from arvideo_ds.decoding.video import RejectedError
from arvideo_ds.errors import UserError
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """New processes import `count` by its module's name; they get the search path of this one."""
    monkeypatch.syspath_prepend(str(ROOT))


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


def collected(tasks: list[tuple[str, int]], **options: Any) -> dict[tuple[str, int], list[Any]]:
    found = defaultdict(list)
    for task, item in stream_all(count, tasks, **options):
        found[task].append(item)
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_every_task_gives_its_items_in_order_and_an_end(workers: int) -> None:
    tasks = [("good", n) for n in range(5)] + [("reject", 2), ("raise", 1)]
    found = collected(tasks, workers=workers, timeout_s=60)
    for number in range(5):
        assert found["good", number] == [*range(number), Finished()]
    assert found["reject", 2] == [0, 1, Failed("short", "too short", rejected=True)]
    assert found["raise", 1] == [0, Failed("error", "ZeroDivisionError: a bug")]


def test_one_that_hangs_and_one_that_dies_are_replaced() -> None:
    tasks = [("hang", 2), ("die", 1), ("good", 3), ("good", 4)]
    found = collected(tasks, workers=1, timeout_s=1)
    assert found["hang", 2][:2] == [0, 1]
    assert found["hang", 2][2].reason == "timeout"
    assert found["die", 1][-1] == Failed("crash", "the decoder's process died (exit code 7)")
    assert found["good", 3] == [0, 1, 2, Finished()]
    assert found["good", 4][-1] == Finished()


def test_one_that_spoke_while_others_were_dealt_with_is_not_late() -> None:
    tasks = [("good", 1), ("later", 2), ("later", 3)]
    found = defaultdict(list)
    for task, item in stream_all(count, tasks, workers=3, timeout_s=2):
        if not found:
            time.sleep(2.5)
        found[task].append(item)
    assert found == {(what, number): [*range(number), Finished()] for what, number in tasks}


@pytest.mark.parametrize("workers", [0, 1])
def test_what_the_user_can_put_right_ends_everything(workers: int) -> None:
    with pytest.raises(UserError, match="put it right"):
        collected([("wrong", 1), ("good", 1)], workers=workers, timeout_s=60)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stop_finishes_what_is_under_way(workers: int) -> None:
    seen = []
    tasks = [("good", 3), ("good", 4)]
    for task, item in stream_all(
        count, tasks, workers=workers, timeout_s=60, stop=lambda: bool(seen)
    ):
        seen.append((task, item))
    assert seen == [(("good", 3), item) for item in (0, 1, 2, Finished())]


class DiesAsItStarts:
    def __call__(self, task: int) -> Iterator[int]:
        yield task

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (3,)


@pytest.mark.slow
def test_processes_that_do_not_start_end_in_advice() -> None:
    with pytest.raises(UserError, match=r"exit code 3.*fewer --workers"):
        list(stream_all(DiesAsItStarts(), [1], workers=1, timeout_s=60))
