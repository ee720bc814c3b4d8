"""Errors that are meant for people, and how a command ends because of one."""

from __future__ import annotations

import contextlib
import functools
import os
import select
import sys
from collections.abc import Callable, Iterator

EXIT_OK = 0
EXIT_USER_ERROR = 2
# Done, and more was left out than --max_reject_share allows.
EXIT_MANY_REJECTS = 3
# Interrupted: the same command goes on, or begins again where nothing is kept. Scripts that requeue
# check for exactly this code (EX_TEMPFAIL).
EXIT_INTERRUPTED = 75
# Standard output was closed by its reader, such as `head`: 128 + SIGPIPE, as shells report it.
EXIT_PIPE_CLOSED = 141


class UserError(Exception):
    """Something the user can put right.

    The message is one paragraph that says what is wrong, where it stands and how to fix it.
    Commands print it without a traceback and exit with `EXIT_USER_ERROR`.
    """


@contextlib.contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Around imports of packages that an extra of setup.py brings. Errors: `UserError`."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"{error}; {how_to_install(extra)}") from None


def how_to_install(extra: str) -> str:
    command = f"pip install 'arvideo_ds[{extra}]'"
    return f"install it with: {command}, in a checkout: pip install -e '.[{extra}]'"


def command(main: Callable[[], int | None]) -> Callable[[], int]:
    """Make `main` a command, whose expected ends have an exit code and no traceback.

    `UserError`: one paragraph on stderr, `EXIT_USER_ERROR`. Ctrl-C, where `main` does not handle
    it: `EXIT_INTERRUPTED`. A reader of standard output that has left: `EXIT_PIPE_CLOSED`.
    """

    @functools.wraps(main)
    def run() -> int:
        try:
            code = main() or EXIT_OK
            # Here, not at the interpreter's end, where an error could no longer be handled.
            sys.stdout.flush()
            return code
        except UserError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
            return EXIT_USER_ERROR
        except KeyboardInterrupt:
            print("interrupted.", file=sys.stderr, flush=True)
            return EXIT_INTERRUPTED
        except BrokenPipeError:
            if not _reader_left():
                raise
            # What is still in the buffer goes nowhere, without another error.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_PIPE_CLOSED

    return run


def _reader_left() -> bool:
    """Whether standard output is a pipe that nobody reads any more."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (OSError, ValueError):  # not a file, or closed
        return False
