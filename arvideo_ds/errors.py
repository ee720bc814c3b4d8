"""Errors that are meant for people, and how a command ends because of one."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

EXIT_OK = 0
EXIT_USER_ERROR = 2
# Done, and more was left out than --max_reject_share allows.
EXIT_MANY_REJECTS = 3
# Saved; the same command goes on. Scripts that requeue ask for exactly this code (EX_TEMPFAIL).
EXIT_INTERRUPTED = 75
# Ctrl-C in a tool, as shells have it.
EXIT_STOPPED = 130


class UserError(Exception):
    """Something the user can put right.

    The message is one paragraph that says what is wrong, where it stands and how to fix it.
    Commands print it without a traceback and exit with `EXIT_USER_ERROR`.
    """


def command(main: Callable[[], int | None]) -> Callable[[], int]:
    """Make `main` a command: a `UserError` becomes one paragraph on stderr, not a traceback.

    So does Ctrl-C, where `main` has no better word for it.
    """

    @functools.wraps(main)
    def run() -> int:
        try:
            return main() or EXIT_OK
        except UserError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
            return EXIT_USER_ERROR
        except KeyboardInterrupt:
            print("interrupted.", file=sys.stderr, flush=True)
            return EXIT_STOPPED

    return run
