"""One writer per folder: an exclusive lock that ends with the process that has it.

The lock is `flock` on the file `.lock` in the folder, which stays there, empty while nobody writes.
(Deleting it would let two processes lock two files of one name.) On NFS, Linux turns `flock` into a
lock of the file server, so it also holds between machines. While the lock is held, the file says
which process has it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import IO

from arvideo_ds.errors import UserError

LOCK = ".lock"
_STALE_LOCK_S = 120
_POLL_S = 1.0


class FolderLock:
    """A held lock. Use it in a `with` statement, or call `close`."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._write(f"process {os.getpid()} on {socket.gethostname()}")

    def close(self) -> None:
        if not self._file.closed:
            self._write("")
            self._file.close()

    def _write(self, owner: str) -> None:
        # The text is only for messages: a full disk must not stop a run here.
        with contextlib.suppress(OSError):
            self._file.seek(0)
            self._file.truncate()
            self._file.write(owner)
            self._file.flush()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def lock(folder: Path, part: str = "", *, wait: bool = False) -> FolderLock:
    """Make the folder and lock it, or a part of it, until the returned lock is closed.

    wait: wait for another process to finish instead of refusing. Errors: `UserError` if another
    process has the lock, or nothing can be written there.
    """
    file = _open(folder, f"{LOCK}{part}")
    # A file server may hold the lock of a lost node for a while after Slurm started the job anew.
    limit = time.monotonic() + (_STALE_LOCK_S if "SLURM_RESTART_COUNT" in os.environ else 0)
    while not _try_lock(file, folder):
        if not wait and time.monotonic() > limit:
            file.seek(0)
            owner = file.read(200).strip()
            file.close()
            raise UserError(
                f"another run{f' ({owner})' if owner else ''} is writing to {folder}. Wait for "
                "it, or choose another folder (--output)."
            )
        time.sleep(_POLL_S)
    return FolderLock(file)


def make_folder(folder: Path) -> None:
    """Errors: `UserError` where the folder is not there and cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"--output {folder} is a file; give a folder.") from None
    except OSError as error:
        raise _not_writable(folder, error) from None


def _open(folder: Path, name: str) -> IO[str]:
    make_folder(folder)
    try:
        # Not "w": that would delete the name of the process that has the lock.
        return (folder / name).open("a+")
    except OSError as error:
        raise _not_writable(folder, error) from None


def _not_writable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write to {folder} ({error.strerror}); choose another folder (--output)."
    )


def _try_lock(file: IO[str], folder: Path) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        file.close()
        raise UserError(
            f"the file system of {folder} has no file locks ({error.strerror}). Choose a folder "
            "(--output) on another file system, or mount this one with locks (Lustre: -o flock)."
        ) from None
    return True
