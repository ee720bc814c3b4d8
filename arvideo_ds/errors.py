"""Errors for users, and the exit codes of commands."""

from __future__ import annotations

import contextlib
import functools
import os
import select
import sys
from collections.abc import Callable, Iterator

EXIT_OK = 0
EXIT_USER_ERROR = 2
# Done, but more videos were rejected than --max_reject_share allows.
EXIT_MANY_REJECTS = 3
# Interrupted: the same command resumes, or restarts where nothing was saved. Scripts that requeue
# check for this code (EX_TEMPFAIL).
EXIT_INTERRUPTED = 75
# The reader of standard output, such as `head`, closed it: 128 + SIGPIPE, as in shells.
EXIT_PIPE_CLOSED = 141


class UserError(Exception):
    """A mistake that the user can fix. The message is one paragraph: what is wrong, where, and how
    to fix it. Commands print it without a traceback and exit with `EXIT_USER_ERROR`."""


@contextlib.contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Around imports of packages of an extra of setup.py. Errors: `UserError`."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"{error}; {how_to_install(extra)}") from None


def how_to_install(extra: str) -> str:
    command = f"pip install 'arvideo_ds[{extra}]'"
    return f"install it with: {command}, in a checkout: pip install -e '.[{extra}]'"


def command(main: Callable[[], int | None]) -> Callable[[], int]:
    """Make `main` a command that ends with an exit code and no traceback on expected errors.
    `UserError`: one paragraph on stderr, `EXIT_USER_ERROR`. Ctrl-C that `main` does not handle:
    `EXIT_INTERRUPTED`. Standard output closed by its reader: `EXIT_PIPE_CLOSED`."""

    @functools.wraps(main)
    def run() -> int:
        try:
            code = main() or EXIT_OK
            # At the interpreter's end, an error could no longer be handled.
            sys.stdout.flush()
            return code
        except UserError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
            return EXIT_USER_ERROR
        except KeyboardInterrupt:
            print("interrupted; start the same command again.", file=sys.stderr, flush=True)
            return EXIT_INTERRUPTED
        except BrokenPipeError:
            if not _reader_left():
                raise
            # Discard the buffer without another error.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_PIPE_CLOSED

    return run


def _reader_left() -> bool:
    """Whether standard output is a pipe without a reader."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (OSError, ValueError):  # not a file, or closed
        return False
