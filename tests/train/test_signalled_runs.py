"""Real runs under every launcher that get signals until they are gone: code 75, no traceback."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from arvideo_ds.engine.checkpoints import newest_checkpoint
from arvideo_ds.errors import EXIT_INTERRUPTED
from tests.conftest import free_port
from tests.train.conftest import Runs, processes_of, stop

pytestmark = [pytest.mark.dist, pytest.mark.slow]
LAUNCHERS: dict[str, tuple[str, ...]] = {
    "python": (sys.executable,),
    "deepspeed": ("deepspeed", "--num_gpus=2"),
    "torchrun": ("torchrun", "--nproc_per_node=2"),
}
LATER = (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


def wait_until(what: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    limit = time.monotonic() + 120
    while process.poll() is None and not what():
        assert time.monotonic() < limit, "it did not come"
        time.sleep(0.02)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_signals_until_a_run_is_gone_change_neither_its_save_nor_its_code(
    launcher: str, runs: Runs
) -> None:
    words = LAUNCHERS[launcher]
    if launcher != "python":
        words = (*words, f"--master_port={free_port()}")
    process = runs.start(launcher, "train.max_steps=3000", launcher=words)
    folder = runs.folder / launcher
    lines: list[str] = []
    assert process.stdout is not None
    reader = threading.Thread(target=lambda: lines.extend(process.stdout or ()), daemon=True)
    reader.start()
    try:
        wait_until(lambda: any(line.startswith("step 3/") for line in lines), process)
        ranks = processes_of(folder)
        for rank in ranks:
            os.kill(rank, signal.SIGUSR1)
        for number in itertools.cycle(LATER):
            gone = 0
            for rank in ranks:
                try:
                    os.kill(rank, number)
                except ProcessLookupError:
                    gone += 1
            if gone == len(ranks) or process.poll() is not None:
                break
            time.sleep(0.01)
        process.wait(timeout=120)
    finally:
        stop(process)
    reader.join(timeout=10)
    output = "".join(lines)
    if launcher == "torchrun":
        # Its own code for a rank that did not end with 0; it prints those of the ranks.
        assert process.returncode == 1
        assert f"exitcode: {EXIT_INTERRUPTED}" in " ".join(output.replace(":", ": ").split())
    else:
        assert process.returncode == EXIT_INTERRUPTED, output[-3000:]
    ours = output.partition("torch/distributed/elastic")[0]  # it has a traceback of its own
    assert "Traceback" not in ours, ours[-3000:]
    newest = newest_checkpoint(folder / "checkpoints")
    assert newest is not None
    assert f"interrupted after {newest.step} of" in output
