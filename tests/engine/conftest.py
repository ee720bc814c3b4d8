"""Scripts of this folder on several ranks, for tests of what only several ranks can show."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import run_script

OnRanks = Callable[..., Any]


@pytest.fixture(scope="session")
def on_ranks() -> OnRanks:
    """`run_on_ranks`, for the tests."""
    return run_on_ranks


def run_on_ranks(script: str, ranks: int, *arguments: str | Path, timeout: float = 900) -> Any:
    """Run a script of this folder on so many ranks; returns what it printed after RESULT."""
    path = Path(__file__).with_name(script)
    done = run_script(path, *arguments, ranks=ranks, timeout=timeout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(found[0].removeprefix("RESULT ")) if found else None
