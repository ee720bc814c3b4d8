"""What a signal means before a run listens, after it has ended, and to the programs it started.

While a run trains, interrupt.py takes the signals. Needs no torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

from arvideo_ds.errors import EXIT_INTERRUPTED

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_POLL_S = 0.1


def end_on_signals() -> None:
    """From now on a signal ends this process with EXIT_INTERRUPTED: there is nothing to save."""

    def end(_number: int, _frame: FrameType | None) -> None:
        ignore_signals()
        sys.exit(EXIT_INTERRUPTED)

    for number in SIGNALS:
        signal.signal(number, end)


def ignore_signals() -> None:
    """From now on, until the interpreter is gone: the exit code is decided."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Children:
    """Programs that this one starts: signals go on to them, and it ends after they have.

    Entered by the main thread; `run` may be called by any. Each program has a process group of its
    own, and all of the group get the signal, as at a terminal's Ctrl-C: a launcher and its ranks.
    """

    def __init__(self) -> None:
        self._groups: set[int] = set()
        # Of one thread too: a signal may come while this very thread holds it.
        self._lock = threading.RLock()
        self._before: dict[int, Any] = {}
        self.received: signal.Signals | None = None

    def __enter__(self) -> Children:
        # A terminal that closes reaches them no longer by itself.
        listened = [*SIGNALS, signal.SIGHUP]
        for number in listened:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup wants it
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if self.received is None else signal.SIG_IGN)

    def run(self, command: Sequence[str], **options: Any) -> int:
        """Run a program to its end; its exit code. options: of subprocess.Popen.

        Errors: `SystemExit` with EXIT_INTERRUPTED once it has ended, if a signal came, or if the
        program itself ended with that code.
        """
        with self._lock:
            if self.received is not None:
                raise SystemExit(EXIT_INTERRUPTED)
            child = subprocess.Popen(command, start_new_session=True, **options)
            self._groups.add(child.pid)
        if self.received is not None:  # it came while the program was being started
            self._send(child.pid)
        code = child.wait()
        if self.received is not None:
            _wait_for_group(child.pid)
        with self._lock:
            self._groups.discard(child.pid)
        if self.received is not None or code == EXIT_INTERRUPTED:
            raise SystemExit(EXIT_INTERRUPTED)
        return code

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        # Not print: a signal may come in the middle of one.
        os.write(2, f"{self.received.name}: the running programs save and end\n".encode())
        with self._lock:
            for group in self._groups:
                self._send(group)

    def _send(self, group: int) -> None:
        # All but Ctrl-C mean the same to a run, and SIGTERM is what every program knows.
        number = signal.SIGINT if self.received == signal.SIGINT else signal.SIGTERM
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.killpg(group, number)


def _wait_for_group(group: int) -> None:
    """A launcher may end before its ranks have saved."""
    while True:
        try:
            os.killpg(group, 0)
        except (ProcessLookupError, PermissionError):
            return
        time.sleep(_POLL_S)
