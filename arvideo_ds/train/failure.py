"""A failing rank prints its own error, the other ranks name it, and all exit within seconds.

    <run>/failures/rank-00001.txt   what ended this rank at its last start

A rank that only lost its peers ("connection closed by peer", an aborted collective) waits a moment
for the failure of another rank, and names that rank instead of printing a traceback.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from arvideo_ds.engine.world import World
from arvideo_ds.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, UserError
from arvideo_ds.files.atomic import write_text

FOLDER = "failures"
EXIT_CRASH = 1
_WAIT_S = 5.0
_POLL_S = 0.2
# What gloo, NCCL and the TCP store report when another process is gone.
_LOST_PEER = re.compile(
    r"by peer|Connection (reset|closed|refused)|Broken pipe|recvValue failed|sendBytes failed|"
    r"Socket Timeout|timed out|Timed out|remote process exited|was aborted",
    re.IGNORECASE,
)


def guarded(run: Callable[[], int], folder: Path, world: World) -> int:
    """`run()`; an error ends this process, and is printed once for all ranks."""
    rank, path = world.rank, _file(folder, world.rank)
    path.unlink(missing_ok=True)
    try:
        return run()
    except UserError as error:
        if world.size == 1:
            raise
        text, code = f"error: {' '.join(str(error).split())}", EXIT_USER_ERROR
        _write(path, text)
        # As a rule every rank has the same error; rank 0 prints it.
        if rank and _wait_for(folder, [0]) == 0 and _file(folder, 0).read_text() == text:
            text = ""
    except KeyboardInterrupt:
        text = f"rank {rank}: ended without a save by a second Ctrl-C; the same command goes on."
        code = EXIT_INTERRUPTED
        _write(path, text)
    except Exception as error:
        code = EXIT_CRASH
        if world.size > 1 and _LOST_PEER.search(f"{type(error).__name__} {error}"):
            text = _lost_peer(folder, world, error)
        else:
            text = f"rank {rank} on {socket.gethostname()} failed:\n{traceback.format_exc()}"
            _write(path, text)
    if text:
        print(text, file=sys.stderr)
    return _leave(code)


def _lost_peer(folder: Path, world: World, error: Exception) -> str:
    here = f"rank {world.rank} on {socket.gethostname()} stops"
    failed = _wait_for(folder, [rank for rank in range(world.size) if rank != world.rank])
    if failed is not None:
        return f"{here}, since rank {failed} failed (see {_file(folder, failed)})"
    message = " ".join(str(error).split())[:300]
    return (
        f"{here}: another rank is gone without a report (killed, out of memory, or its node is "
        f"lost), or the network failed: {message}"
    )


def _wait_for(folder: Path, ranks: list[int]) -> int | None:
    limit = time.monotonic() + _WAIT_S
    while time.monotonic() < limit:
        for rank in ranks:
            if _file(folder, rank).is_file():
                return rank
        time.sleep(_POLL_S)
    return None


def _file(folder: Path, rank: int) -> Path:
    return folder / FOLDER / f"rank-{rank:05d}.txt"


def _write(path: Path, text: str) -> None:
    # On a full disk the text is only printed.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)


def _leave(code: int) -> NoReturn:
    # No teardown: it would wait for ranks that are gone.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
