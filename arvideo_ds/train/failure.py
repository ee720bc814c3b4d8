"""When a rank fails: its own error first, the others' echoes of it after, and out within seconds.

    <run>/failures/rank-00001.txt   what ended this rank at its last start

A rank that only lost its peers ("connection closed by peer", a collective that was aborted) waits
a moment for the one that has something to say, and then names it instead of a traceback.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from arvideo_ds.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, UserError
from arvideo_ds.files.atomic import write_text

FOLDER = "failures"
EXIT_CRASH = 1
_WAIT_S = 5.0
_POLL_S = 0.2
# How gloo, NCCL and the TCP store say that somebody else is gone.
_LOST_PEER = re.compile(
    r"by peer|Connection (reset|closed|refused)|Broken pipe|recvValue failed|sendBytes failed|"
    r"Socket Timeout|timed out|Timed out|remote process exited|was aborted",
    re.IGNORECASE,
)


def guarded(run: Callable[[], int], folder: Path, *, rank: int, size: int) -> int:
    """`run()`, or the end of this process with its reason told once for all ranks."""
    own = _file(folder, rank)
    own.unlink(missing_ok=True)
    try:
        return run()
    except UserError as error:
        if size == 1:
            raise
        text, code = f"error: {' '.join(str(error).split())}", EXIT_USER_ERROR
        _write(own, text)
        # Every rank has the same to say as a rule; the first says it.
        if rank == 0 or _wait_for(folder, 0) != text:
            print(text, file=sys.stderr)
    except KeyboardInterrupt:
        text, code = "ended at once, without a save, by a second Ctrl-C", EXIT_INTERRUPTED
        _write(own, text)
        print(f"rank {rank}: {text}; the same command goes on.", file=sys.stderr)
    except Exception as error:
        code = EXIT_CRASH
        if size > 1 and _LOST_PEER.search(f"{type(error).__name__} {error}"):
            print(_echo(folder, rank, size, error), file=sys.stderr)
        else:
            text = f"rank {rank} on {socket.gethostname()} failed:\n{traceback.format_exc()}"
            _write(own, text)
            print(text, file=sys.stderr)
    return _leave(code)


def _echo(folder: Path, rank: int, size: int, error: Exception) -> str:
    """What a rank says that only lost its peers."""
    own = f"rank {rank} on {socket.gethostname()} stops"
    others = [other for other in range(size) if other != rank]
    limit = time.monotonic() + _WAIT_S
    while time.monotonic() < limit:
        for other in others:
            if _file(folder, other).is_file():
                return f"{own}, since rank {other} failed (see {_file(folder, other)})"
        time.sleep(_POLL_S)
    message = " ".join(str(error).split())[:300]
    return (
        f"{own}: another rank is gone and left no word (killed, out of memory, or its node is "
        f"lost), or the network failed: {message}"
    )


def _wait_for(folder: Path, rank: int) -> str:
    limit = time.monotonic() + _WAIT_S
    while time.monotonic() < limit and not _file(folder, rank).is_file():
        time.sleep(_POLL_S)
    path = _file(folder, rank)
    return path.read_text() if path.is_file() else ""


def _file(folder: Path, rank: int) -> Path:
    return folder / FOLDER / f"rank-{rank:05d}.txt"


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError:  # a full disk; the text is printed all the same
        pass


def _leave(code: int) -> NoReturn:
    # No teardown: it would wait for ranks that are gone.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
