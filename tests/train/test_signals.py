"""Whatever signal comes, and however often: children end first, and the exit code is 75."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from arvideo_ds.errors import EXIT_INTERRUPTED
from arvideo_ds.train.failure import guarded
from arvideo_ds.train.interrupt import Interrupt
from arvideo_ds.train.signals import SIGNALS, Children
from tests.conftest import ROOT

FOUR = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]
# A program whose child "saves": it takes a moment after the signal, leaves a mark, ends with 75.
CHILD = """
import os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
def save(*_):
    time.sleep(0.4); (folder / "saved").write_text(""); sys.exit(75)
for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, save)
(folder / "pid").write_text(str(os.getpid()))
time.sleep(60)
"""
# It dies of the signal at once, as DeepSpeed's first process does.
LAUNCHER = """
import signal, subprocess, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
subprocess.Popen([sys.executable, *sys.argv[1:]]).wait()
"""
PARENT = """
import sys
from concurrent.futures import ThreadPoolExecutor
from arvideo_ds.train.signals import Children
words = [sys.executable, *sys.argv[2:]]
with Children() as children, ThreadPoolExecutor(1) as pool:
    if sys.argv[1] == "thread":
        pool.submit(children.run, words).result()
    else:
        children.run(words)
print("not reached")
"""


def wait_for(path: Path, seconds: float = 20) -> None:
    limit = time.monotonic() + seconds
    while not (path.is_file() and path.read_text()):
        assert time.monotonic() < limit, f"{path} did not come"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"


@pytest.mark.parametrize("launched", [False, True], ids=["child", "below a launcher"])
@pytest.mark.parametrize(
    ("number", "where"),
    [(signal.SIGTERM, "thread"), (signal.SIGINT, "main"), (signal.SIGUSR1, "main")],
)
def test_a_signal_goes_on_to_the_children_and_waits_for_them(
    number: signal.Signals, where: str, launched: bool, tmp_path: Path
) -> None:
    for name, code in (("child", CHILD), ("launcher", LAUNCHER), ("parent", PARENT)):
        (tmp_path / f"{name}.py").write_text(code)
    words = [*([tmp_path / "launcher.py"] if launched else []), tmp_path / "child.py", tmp_path]
    process = subprocess.Popen(
        [sys.executable, tmp_path / "parent.py", where, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    wait_for(tmp_path / "pid")
    child = int((tmp_path / "pid").read_text())
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == EXIT_INTERRUPTED, err
    assert not alive(child)
    assert (tmp_path / "saved").is_file()
    assert "Traceback" not in err
    assert "not reached" not in out


def test_children_that_end_by_themselves_give_their_codes() -> None:
    with Children() as children:
        assert children.run([sys.executable, "-c", "raise SystemExit(3)"]) == 3
        with pytest.raises(SystemExit) as raised:
            children.run([sys.executable, "-c", "raise SystemExit(75)"])
    assert raised.value.code == EXIT_INTERRUPTED
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


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
def test_a_second_ctrl_c_ends_at_once_and_says_that_nothing_was_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    codes: list[int] = []

    def leave(code: int) -> None:
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
        guarded(twice, tmp_path, rank=0, size=1)
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
