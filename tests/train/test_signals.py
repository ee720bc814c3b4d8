"""Whatever signal comes, and however often: the exit code is 75."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from arvideo_ds.engine.world import World
from arvideo_ds.errors import EXIT_INTERRUPTED
from arvideo_ds.train.failure import Peers, guarded
from arvideo_ds.train.signals import SIGNALS, Interrupt
from tests.conftest import ROOT

FOUR = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]


@pytest.fixture
def handlers() -> Iterator[None]:
    """This process's handlers, whatever a test leaves."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_after_the_agreed_save_no_signal_is_heard_any_more() -> None:
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        interrupt.trained(interrupted=True)
        for number in FOUR * 2:
            os.kill(os.getpid(), number)
    for number in FOUR * 2:  # the interpreter is ending
        os.kill(os.getpid(), number)


@pytest.mark.usefixtures("handlers")
def test_a_finished_run_gives_the_signals_back() -> None:
    """An ablation's cell goes on in the same process."""
    before = [signal.getsignal(number) for number in FOUR]
    with Interrupt() as interrupt:
        interrupt.trained(interrupted=False)
        os.kill(os.getpid(), signal.SIGTERM)
    assert [signal.getsignal(number) for number in FOUR] == before


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("asked", [signal.SIGUSR1, signal.SIGUSR2])
def test_ctrl_c_after_a_scheduler_s_signal_never_prevents_the_save(asked: signal.Signals) -> None:
    """Signals that come during a long call are handled by their number, SIGINT first."""
    with Interrupt() as interrupt:
        signal.pthread_sigmask(signal.SIG_BLOCK, FOUR)
        try:
            os.kill(os.getpid(), asked)
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, FOUR)
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.received == asked


@pytest.mark.usefixtures("handlers")
def test_a_second_ctrl_c_ends_at_once_and_says_that_nothing_was_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    codes: list[int] = []

    def leave(code: int, text: str) -> None:
        print(text, file=sys.stderr)
        codes.append(code)

    monkeypatch.setattr("arvideo_ds.train.failure._leave", leave)

    def run() -> int:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGINT):
            os.kill(os.getpid(), number)
        return 0

    def twice() -> int:
        os.kill(os.getpid(), signal.SIGINT)
        return run()

    with Interrupt():
        world = World(0, 1, 0, 1, torch.device("cpu"), "python", 1)
        guarded(twice, Peers(tmp_path, world))
        os.kill(os.getpid(), signal.SIGINT)
    assert codes == [EXIT_INTERRUPTED]
    assert "by a second Ctrl-C; the same command goes on" in capsys.readouterr().err


AFTER = """
import os, signal, sys
from arvideo_ds.train.signals import end_on_signals, ignore_signals
class Late:  # torn down by the interpreter itself
    def __del__(self):
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT): os.kill(os.getpid(), number)
late = Late()
late.itself = late
"""


@pytest.mark.parametrize(
    "end",
    [
        "ignore_signals(); sys.exit(75)",
        "end_on_signals(); os.kill(os.getpid(), signal.SIGUSR2)",
    ],
    ids=["after the run", "before it listens"],
)
def test_signals_while_the_interpreter_ends_change_nothing(end: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", AFTER + end],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
        timeout=20,
    )
    assert (done.returncode, done.stderr) == (EXIT_INTERRUPTED, "")
