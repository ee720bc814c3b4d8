"""check.py: what it writes whatever happens to its stages, and its stages on the imaginary GPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, command_environment, run_command
from tests.fakecuda.build import environment, unavailable
from tests.gpu.check import PASSED, SHARES, Stage, run_stages, table

CHECK = ROOT / "tests" / "gpu" / "check.py"
WRITE = "import sys; open(sys.argv[1], 'w').write('{\"seen\": 1}'); "
HANG = "import time; time.sleep(60)"
# On the imaginary GPU; ARVIDEO_GPU_STAGES=all takes four minutes.
STAGES = os.environ.get("ARVIDEO_GPU_STAGES", "doctor,benchmark_eager,shards")


def stage(name: str, code: str, share: float = 0.9) -> Stage:
    return Stage(name, share, [sys.executable, "-c", code])


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_a_stage_that_fails_or_hangs_does_not_stop_the_others(tmp_path: Path) -> None:
    stages = [
        stage("good", WRITE),
        stage("broken", WRITE + "print('why'); sys.exit(3)"),
        stage("slow", WRITE + HANG, share=0.1),
        stage("last", WRITE),
    ]
    summary = run_stages(stages, tmp_path, seconds=12)
    statuses = {name: record["status"] for name, record in summary["stages"].items()}
    assert statuses == {
        "good": PASSED,
        "broken": "failed: exit code 3",
        "slow": "timed out after 1 s",
        "last": PASSED,
    }
    assert summary == read(tmp_path / "summary.json")
    for name, status in statuses.items():
        record = read(tmp_path / f"{name}.json")
        # What it wrote before it ended is there.
        assert (record["status"], record["results"]) == (status, {"seen": 1})
        assert status in table(summary)
    assert (tmp_path / "broken.log").read_text() == "why\n"


def test_stages_without_time_are_recorded(tmp_path: Path) -> None:
    summary = run_stages([stage("late", WRITE)], tmp_path, seconds=1)
    assert summary["stages"]["late"]["status"] == "not started"
    assert read(tmp_path / "late.json")["status"] == "not started"


def test_ctrl_c_ends_the_stage_and_its_children(tmp_path: Path) -> None:
    child = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', '{HANG}']); "
    code = child + "print(p.pid, flush=True); p.wait()"
    program = (
        "import signal, sys; from pathlib import Path; from tests.gpu.check import *; "
        "signal.signal(signal.SIGTERM, interrupt); "
        f"stages = [Stage(n, 0.5, [sys.executable, '-c', {code!r}]) for n in ('one', 'two')]; "
        f"run_stages(stages, Path({str(tmp_path)!r}), 60)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=command_environment())
    log = tmp_path / "one.log"
    while not (log.exists() and log.read_text().endswith("\n")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(15) == 0
    summary = read(tmp_path / "summary.json")
    assert summary["interrupted"]
    assert [record["status"] for record in summary["stages"].values()] == [
        "interrupted",
        "not started",
    ]
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text().split()[0]), 0)


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("--stages", "doctor,docter", "--stages docter: unknown; there are: doctor, "),
        ("--minutes", "0", "--minutes 0 must be above 0"),
    ],
)
def test_a_wrong_argument_is_refused(option: str, value: str, reason: str, tmp_path: Path) -> None:
    done = run_command(sys.executable, CHECK, option, value, "--output", tmp_path / "none")
    assert done.returncode == 2
    assert reason in done.stderr
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_the_engine_tests_of_a_gpu_pass_on_a_cpu() -> None:
    """All but torch.compile, which takes minutes there."""
    done = run_command(
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not compiled"),
        ROOT / "tests" / "gpu" / "test_engine_gpu.py",
        ENGINE_TESTS_ON="cpu",
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "28 passed, 1 skipped" in done.stdout


@pytest.mark.fakecuda
@pytest.mark.slow
@pytest.mark.skipif(unavailable() is not None, reason=f"fakecuda: {unavailable()}")
def test_stages_run_on_the_imaginary_gpu(demo_shards: Path, tmp_path: Path) -> None:
    stages = tuple(SHARES) if STAGES == "all" else tuple(STAGES.split(","))
    (tmp_path / "demo_shards").symlink_to(demo_shards)
    arguments = ("--tiny", "--minutes", "8", "--output", tmp_path, "--stages", ",".join(stages))
    variables = {**command_environment(), **environment()}
    subprocess.run([sys.executable, CHECK, *arguments], env=variables, check=False, timeout=600)
    summary = read(tmp_path / "summary.json")
    print(table(summary))
    assert summary["imaginary"]
    assert summary["machine"]["gpu"] == "Imaginary H200"
    statuses = {name: record["status"] for name, record in summary["stages"].items()}
    assert statuses == dict.fromkeys(stages, PASSED)
    for name in stages:
        record = read(tmp_path / f"{name}.json")
        assert record["imaginary"] and record["results"], name
    rows = [name == "benchmark_compiled" for name in stages if name.startswith("benchmark")]
    assert [row["compile"] for row in summary["benchmark"]] == rows
    if STAGES != "all":
        return
    assert len(list((tmp_path / "traces").iterdir())) == 2
    tests = read(tmp_path / "tests.json")["results"]
    # They took the CUDA path; only comparisons of values failed.
    assert tests["passed"] + len(tests["failed"]) == 28
    assert [text for text in tests["failed"].values() if not text.startswith("assert")] == []
