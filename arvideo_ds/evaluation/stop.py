"""Signals that stop a pass over many videos; videos in progress are finished first."""

from __future__ import annotations

import os
import signal
from types import FrameType


class Stop:
    """The first Ctrl-C or SIGTERM requests a stop, the second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self._requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def requested(self) -> bool:
        return self._requested

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._requested:
            raise KeyboardInterrupt
        self._requested = True
        # Not print: a signal may come in the middle of one.
        os.write(2, b"\nfinishing the videos in progress; Ctrl-C again ends at once\n")
