"""Work in processes: order, and what hangs, dies or raises costs one task only."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from arvideo_ds.decoding import processes
from arvideo_ds.decoding.processes import Failed, Finished, killable_map, stream_all
from arvideo_ds.errors import UserError
from tests.conftest import ROOT, run_command
from tests.decoding.work import DiesAsItStarts, answer, count


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """New processes import `work` by its name; they get the search path of this one."""
    monkeypatch.syspath_prepend(str(ROOT))


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


@pytest.mark.slow
def test_processes_that_do_not_start_end_in_advice() -> None:
    with pytest.raises(UserError, match=r"exit code 3.*fewer --workers"):
        list(stream_all(DiesAsItStarts(), [1], workers=1, timeout_s=60))


def test_calls_give_their_results_in_order_and_what_hangs_or_dies_costs_one() -> None:
    names = ["late", "good", "hang", "good", "die", "raise", *["good"] * 9]
    calls = list(zip(names, range(len(names)), strict=True))
    found = list(killable_map(answer, calls, workers=2, timeout_s=1))
    for (what, number), result in zip(calls, found, strict=True):
        if what in ("hang", "die", "raise"):
            assert isinstance(result, Failed)
        else:
            assert result[0] == number
    assert [found[number].reason for number in (2, 4, 5)] == ["timeout", "crash", "error"]
    assert "1 s" in found[2].message and "7" in found[4].message
    assert found[5].message == "put it right."


def test_a_process_is_replaced_after_so_many_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_TASKS_PER_PROCESS", 2)
    calls = [("good", number) for number in range(5)]
    used = [process for _, process in killable_map(answer, calls, workers=1, timeout_s=60)]
    assert used[0] == used[1] != used[2] == used[3] != used[4]


def test_few_calls_are_ahead_of_the_results_that_were_taken() -> None:
    begun = 0

    def calls() -> Iterator[tuple[str, int]]:
        nonlocal begun
        for begun in range(1, 100):
            yield "good", begun

    results = killable_map(answer, calls(), workers=1, timeout_s=60)
    for taken in range(1, 4):
        assert next(results)[0] == taken
        assert begun <= taken + 4
    results.close()


PROGRAM = """
from arvideo_ds.decoding.processes import killable_map

def same(number):
    return number

if __name__ == "__main__":
    for _ in range(12):
        print(list(killable_map(same, [(1,), (2,), (3,)], workers=6, timeout_s=60)))
    for result in killable_map(same, [(1,)] * 99, workers=2, timeout_s=60):
        raise SystemExit("enough")
"""


@pytest.mark.slow
def test_processes_end_in_silence_also_where_the_program_ends_before_them(tmp_path: Path) -> None:
    """Some are only starting then; and all ignore the SIGTERM of multiprocessing's own exit."""
    (tmp_path / "program.py").write_text(PROGRAM)
    done = run_command(sys.executable, tmp_path / "program.py")
    assert done.returncode == 1 and done.stdout == "[1, 2, 3]\n" * 12
    assert done.stderr == "enough\n"
