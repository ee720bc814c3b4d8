"""A step that is not finite leaves nothing behind: not in the weights, not in the optimiser."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.dist
def test_steps_that_are_not_finite_leave_no_trace_at_any_stage_and_precision(run: Run) -> None:
    script = Path(__file__).parent / "refuse.py"
    done = run("deepspeed", "--num_gpus=2", "--master_port=29871", script, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    results: list[dict[str, Any]] = json.loads(line.removeprefix("RESULT "))
    assert len(results) == 4 * 2 * 2 * 2
    # The same weights, bit for bit, as without the bad steps: Adam has not counted them either.
    assert [r for r in results if not r["equal"] or r["refused"] != [0, 1, 0, 1, 0]] == []
