"""A process with torch already imported is a process like any other."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests import warm_start
from tests.conftest import run_script

pytestmark = pytest.mark.dist

SCRIPT = """
import atexit, json, os, pathlib, random, sys, time
import numpy as np
loaded = "torch" in sys.modules
atexit.register(print, "at exit")
print(json.dumps([__name__, sys.argv[1:], os.getcwd(), os.environ.get("COLOUR"), loaded]))
print("to stderr", file=sys.stderr)
if "draw" in sys.argv:
    print(random.random(), np.random.random())
rank = os.environ.get("RANK")
if "wait" in sys.argv:
    print("waits", flush=True)
    time.sleep(600)
if "ranks" in sys.argv:
    pathlib.Path(f"rank-{rank}").write_text(os.environ["WORLD_SIZE"])
    if rank == "0":
        time.sleep(600)  # until rank 1 has failed
    while not pathlib.Path("rank-0").exists():
        time.sleep(0.01)
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def test_it_has_arguments_folder_environment_streams_and_exit_code(script: Path) -> None:
    done = run_script(script, "7", "b", cwd=script.parent, COLOUR="red")
    assert done.returncode == 7
    expected = f'["__main__", ["7", "b"], "{script.parent}", "red", true]\nat exit\n'
    assert done.stdout == expected
    assert done.stderr == "to stderr\n"
    assert "null, true" in run_script(script, "0", cwd=script.parent).stdout, "COLOUR is gone"


def test_unseeded_draws_differ_between_processes(script: Path) -> None:
    outputs = [run_script(script, "0", "draw", cwd=script.parent).stdout for _ in range(2)]
    first, second = (output.splitlines()[1].split() for output in outputs)
    assert all(one != other for one, other in zip(first, second, strict=True))


def test_it_dies_of_signals_and_its_output_ends(script: Path) -> None:
    process = warm_start.start([script, "0", "wait"], cwd=script.parent, env=dict(os.environ))
    assert process.stdout is not None
    assert any(line == "waits\n" for line in process.stdout)
    assert process.poll() is None
    assert os.getsid(process.pid) == process.pid
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.05)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGUSR1
    assert "at exit" not in output


def test_the_rank_that_fails_ends_the_others_and_gives_the_exit_code(script: Path) -> None:
    done = run_script(script, "3", "ranks", ranks=2, cwd=script.parent, timeout=20)
    assert done.returncode == 3
    assert [(script.parent / f"rank-{rank}").read_text() for rank in (0, 1)] == ["2", "2"]
