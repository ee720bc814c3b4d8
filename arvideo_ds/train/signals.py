"""Signals before a run trains and after it has ended; interrupt.py handles them in between.

Needs no torch.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType

from arvideo_ds.errors import EXIT_INTERRUPTED

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
