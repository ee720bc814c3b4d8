"""A failing rank prints its own error, the other ranks name it, and all exit within seconds.

    <run>/failures/rank-00001.txt   what ended this rank at its last start, after its name

A rank that only lost its peers ("connection closed by peer", an aborted collective) waits a moment
for the failure of another rank, and names that rank instead of printing a traceback. On CUDA a
collective without one of its ranks hangs instead; then a thread (`Peers.watched`) ends the process.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn, TypeVar

from arvideo_ds.engine.agreement import gather_objects
from arvideo_ds.engine.world import World
from arvideo_ds.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, UserError
from arvideo_ds.files.atomic import write_text
from arvideo_ds.host import pid_namespace

FOLDER = "failures"
EXIT_CRASH = 1
_WAIT_S = 5.0
_POLL_S = 0.2
_WATCH_S = 1.0
# The watching thread gives the main thread this time to end by itself.
_GRACE_S = 5.0
_FAILED = " failed:\n"
Found = TypeVar("Found")
# What gloo, NCCL and the TCP store report when another process is gone.
_LOST_PEER = re.compile(
    r"by peer|Connection (reset|closed|refused)|Broken pipe|recvValue failed|sendBytes failed|"
    r"Socket Timeout|timed out|Timed out|remote process exited|was aborted",
    re.IGNORECASE,
)


class Peers:
    """The processes of this start and their failure files. Collective, once per start."""

    def __init__(self, folder: Path, world: World) -> None:
        self.rank, self._folder = world.rank, folder / FOLDER
        self._path(self.rank).unlink(missing_ok=True)
        mine = (socket.gethostname(), pid_namespace(), os.getpid())
        # Afterwards every rank has deleted its file of an earlier start.
        self._processes = gather_objects(mine) if world.size > 1 else [mine]
        if len(self) > 1:
            with contextlib.suppress(OSError):
                self._folder.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return len(self._processes)

    def name(self, rank: int) -> str:
        """It also tells this start from earlier ones, and from another one in the same folder."""
        host, _, pid = self._processes[rank]
        return f"rank {rank} on {host} (process {pid})"

    def report(self, rank: int, text: str) -> None:
        """Write a rank's failure file."""
        # On a full disk the text is only printed.
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            write_text(self._path(rank), f"{self.name(rank)}{_FAILED}{text}\n")

    def failure(self, rank: int) -> str | None:
        """What a rank of this start reported."""
        with contextlib.suppress(OSError):
            name, _, text = self._path(rank).read_text().partition(_FAILED)
            if name == self.name(rank):
                return text.rstrip("\n")
        return None

    def failed(self) -> int | None:
        """The first rank of this start with a failure file."""
        with contextlib.suppress(OSError):
            # Unlike a look for a file, listing the folder makes an NFS client ask its server.
            for path in sorted(self._folder.iterdir()):
                match = re.fullmatch(r"rank-(\d{5,})\.txt", path.name)
                rank = int(match[1]) if match else len(self)
                if rank < len(self) and self.failure(rank) is not None:
                    return rank
        return None

    def stops(self, failed: int, text: str | None = None) -> str:
        """Why this rank stops: one line. text: the failure of that rank, else that of its file."""
        text = (text or self.failure(failed) or "").rpartition("\n")[2]
        here = f"rank {self.rank} on {socket.gethostname()} stops"
        return f"{here}, since rank {failed} failed: {text} (see {self._path(failed)})"

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """While entered, the failure of another rank ends this process some seconds later."""
        over = threading.Event()
        thread = threading.Thread(target=self._watch, args=(over,), name="failures", daemon=True)
        if len(self) > 1:
            thread.start()
        try:
            yield
        finally:
            over.set()
            if len(self) > 1:
                thread.join()

    def _watch(self, over: threading.Event) -> None:
        with contextlib.ExitStack() as files:
            self._watch_until(over, self._local(files))

    def _watch_until(self, over: threading.Event, local: dict[int, int]) -> None:
        ended = select.poll()
        for file in local:
            ended.register(file, select.POLLIN)
        while not over.wait(_WATCH_S):
            failed, text = self.failed(), None
            gone = ended.poll(0) if failed is None else []
            # Also a rank that ended well, in the moment after the last barrier.
            if (failed is None and not gone) or over.wait(_GRACE_S):
                continue
            if failed is None and (failed := self.failed()) is None:
                failed, text = local[gone[0][0]], "ended without a report: killed, or out of memory"
                self.report(failed, text)
            _leave(EXIT_CRASH, self.stops(failed, text))

    def _local(self, opened: contextlib.ExitStack) -> dict[int, int]:
        """File descriptors that are readable once a rank of this host has ended -> the rank.

        opened: closes them.
        """
        files, (host, namespace, _) = {}, self._processes[self.rank]
        for rank, (other, its_namespace, pid) in enumerate(self._processes):
            if rank != self.rank and namespace and (other, its_namespace) == (host, namespace):
                with contextlib.suppress(OSError):  # forbidden in some containers
                    files[file := os.pidfd_open(pid)] = rank
                    opened.callback(os.close, file)
        return files

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank-{rank:05d}.txt"


def guarded(run: Callable[[], int], peers: Peers) -> int:
    """`run()`; an error ends this process, and is printed once for all ranks."""
    rank = peers.rank
    try:
        return run()
    except UserError as error:
        if len(peers) == 1:
            raise
        text, code = f"error: {' '.join(str(error).split())}", EXIT_USER_ERROR
        peers.report(rank, text)
        # As a rule every rank has the same error; rank 0 prints it.
        if rank and _wait_for(lambda: peers.failure(0)) == text:
            text = ""
    except KeyboardInterrupt:
        text = f"rank {rank}: ended without a save by a second Ctrl-C; the same command goes on."
        code = EXIT_INTERRUPTED
        peers.report(rank, text)
    except Exception as error:
        code = EXIT_CRASH
        if len(peers) > 1 and _LOST_PEER.search(f"{type(error).__name__} {error}"):
            text = _lost_peer(peers, error)
        else:
            text = traceback.format_exc()
            peers.report(rank, text)
            text = f"{peers.name(rank)}{_FAILED}{text}"
    return _leave(code, text)


def _lost_peer(peers: Peers, error: Exception) -> str:
    if (failed := _wait_for(peers.failed)) is not None:
        return peers.stops(failed)
    message = " ".join(str(error).split())[:300]
    return (
        f"rank {peers.rank} on {socket.gethostname()} stops: another rank is gone without a report "
        f"(killed, out of memory, or its node is lost), or the network failed: {message}"
    )


def _wait_for(look: Callable[[], Found | None]) -> Found | None:
    limit = time.monotonic() + _WAIT_S
    while (found := look()) is None and time.monotonic() < limit:
        time.sleep(_POLL_S)
    return found


def _leave(code: int, text: str) -> NoReturn:
    # The launcher that reads the output may be gone.
    with contextlib.suppress(OSError, ValueError):
        if text:
            print(text, file=sys.stderr)
        sys.stderr.flush()
        sys.stdout.flush()
    # No teardown: it would wait for ranks that are gone.
    os._exit(code)
