"""One writer per folder, or several that share it: a lock that ends with its process.

The lock is `flock` on the file `.lock` in the folder, which names the process that has the lock.
The file stays: after a deletion, two processes could lock two files of one name. On NFS, Linux
turns `flock` into a lock of the file server, so it also works between machines.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from arvideo_ds.errors import UserError

LOCK = ".lock"
_STALE_LOCK_S = 120
_POLL_S = 1.0


def lock(
    folder: Path, part: str = "", *, wait: bool = False, shared: bool = False, what: str = ""
) -> contextlib.ExitStack:
    """Make the folder and lock it, or a part of it, until `close` or the end of a `with` block.

    wait: wait for another process instead of raising. shared: others may share the lock, which
    keeps out those that do not. what: the part in words. Errors: `UserError` if another process
    has the lock, or the folder is not writable.
    """
    with contextlib.ExitStack() as held, _explained_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # Not "w", which would delete the name of the process that has the lock.
        file = held.enter_context((folder / f"{LOCK}{part}").open("a+"))
        # After Slurm requeued a job, a file server may keep the lock of a lost node for a while.
        # One that shares it tries twice: another may have it alone for a moment, to clean up.
        patience = _STALE_LOCK_S if "SLURM_RESTART_COUNT" in os.environ else _POLL_S * shared
        limit = time.monotonic() + patience
        while not _try_lock(file, folder, shared):
            if not wait and time.monotonic() > limit:
                file.seek(0)
                # Those that share a lock do not write their names.
                owner = file.read(200).strip() or "perhaps in parts"
                raise UserError(
                    f"another run ({owner}) is writing {what}to {folder}. Wait for it, or choose "
                    "another folder (--output)."
                )
            time.sleep(_POLL_S)
        if not shared:
            _write_owner(file, f"process {os.getpid()} on {socket.gethostname()}")
            held.callback(_write_owner, file, "")
        return held.pop_all()


def is_locked(path: Path) -> bool:
    """Whether a process has the lock of this file."""
    with path.open("a+") as file:
        return not _try_lock(file, path.parent, shared=True)


def make_folder(folder: Path) -> None:
    """Make the folder if it is missing. Errors: `UserError`."""
    with _explained_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def _explained_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except FileExistsError:
        raise UserError(f"{folder} is a file, expected a folder.") from None
    except OSError as error:
        raise UserError(
            f"cannot write to {folder} ({error.strerror}); choose another folder."
        ) from None


def _write_owner(file: IO[str], owner: str) -> None:
    # Only messages use the text: a full disk must not stop a run here.
    with contextlib.suppress(OSError):
        file.seek(0)
        file.truncate()
        file.write(owner)
        file.flush()


def _try_lock(file: IO[str], folder: Path, shared: bool) -> bool:
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(
            f"the file system of {folder} has no file locks ({error.strerror}). Choose a folder "
            "(--output) on another file system, or mount this one with locks (Lustre: -o flock)."
        ) from None
    return True
