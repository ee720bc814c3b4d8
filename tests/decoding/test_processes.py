"""Calls in processes that can be killed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.conftest import run_command

PROGRAM = """
from arvideo_ds.decoding.processes import killable_map

def same(number):
    return number

if __name__ == "__main__":
    for _ in range(12):
        calls = killable_map(same, [(1,), (2,), (3,)], workers=6, timeout_s=60)
        print([call.result() for call in calls])
"""


@pytest.mark.slow
def test_workers_that_are_only_starting_when_all_is_done_say_nothing(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    done = run_command(sys.executable, tmp_path / "program.py")
    assert done.returncode == 0 and done.stdout == "[1, 2, 3]\n" * 12
    assert done.stderr == ""
