"""Signals before, during and after training; needs no torch."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING, Any

from arvideo_ds.errors import EXIT_INTERRUPTED

if TYPE_CHECKING:
    from arvideo_ds.engine.agreement import AnyRank

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def end_on_signals() -> None:
    """From now on a signal ends this process with EXIT_INTERRUPTED, without a save."""

    def end(_number: int, _frame: FrameType | None) -> None:
        ignore_signals()
        sys.exit(EXIT_INTERRUPTED)

    for number in SIGNALS:
        signal.signal(number, end)


def ignore_signals() -> None:
    """From now on until the process ends: its exit code is decided."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Interrupt:
    """While entered, the first signal only sets a flag; a second Ctrl-C ends the process at once.

    Launchers send SIGTERM after the terminal's SIGINT, so only a repeated SIGINT ends the process;
    none does after a scheduler's SIGUSR1 or SIGUSR2. Once an interrupted run has saved, signals are
    ignored until the process ends, so that its exit code stays.
    """

    def __init__(self) -> None:
        self._agreement: AnyRank | None = None
        self._before: dict[int, Any] = {}
        self._trained = self._over = False
        self.received: signal.Signals | None = None

    def __enter__(self) -> Interrupt:
        self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *error: Any) -> None:
        if not self._over:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def connect(self, agreement: AnyRank) -> None:
        """Make the ranks agree from now on."""
        self._agreement = agreement

    def disconnect(self) -> None:
        """Wait for the last agreement, before the process group ends. Collective."""
        if self._agreement is not None:
            self._agreement.finish()

    def agreed(self) -> bool:
        """Whether to stop now, the same on all ranks. Call once per step."""
        assert self._agreement is not None, "connect() comes first"
        return self._agreement.ask(self.received is not None)

    def trained(self, *, interrupted: bool) -> None:
        """The loop has ended: after the save of an interruption, or after the last step."""
        self._trained, self._over = True, interrupted
        if interrupted:
            ignore_signals()

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            self._over = True
            ignore_signals()
            raise KeyboardInterrupt
        if self.received is None and os.environ.get("RANK", "0") == "0":
            name = signal.Signals(number).name
            what = "all steps are done" if self._trained else "saving after this step, then ending"
            # Not print: a signal may arrive during one.
            os.write(2, f"{name}: {what}\n".encode())
        # After a long call Python handles signals by number, so SIGINT may come before these.
        if self.received is None or number in (signal.SIGUSR1, signal.SIGUSR2):
            self.received = signal.Signals(number)
