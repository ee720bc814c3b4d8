"""Step and phase of every rank; a stalled run reports which ranks are late or silent.

    <run>/heartbeats/rank-00003.json    host, process, step, phase; rewritten every few seconds
    <run>/heartbeats/rank-00003.stack   every thread's stack, once nothing moved for train.stall_s

A timer in C (faulthandler) writes the stack, even while native code blocks the interpreter. Only
the time-out of the collectives ends a stalled run. A rank that no longer writes at all has failed
(failure.py).
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from arvideo_ds.engine.world import World

FOLDER = "heartbeats"
# In the order of a step: the rank in the earlier phase is late.
PHASES = ("start", "data", "forward", "backward", "update", "log", "validate", "save", "end")
_LONGEST_PERIOD_S = 15.0
# A rank that has not written for this many periods is silent.
_SILENT_PERIODS = 3
# Shortest silence of a lost rank; an NFS client may show a file's age a minute late.
_SHORTEST_LOSS_S = 120.0


@dataclass(frozen=True)
class Beat:
    """Where a rank was when it last wrote."""

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    idle_s: float

    @property
    def place(self) -> tuple[int, int]:
        return self.step, PHASES.index(self.phase)

    def __str__(self) -> str:
        place = f"{self.phase} of step {self.step}"
        return f"rank {self.rank} ({self.host}, process {self.pid}) in {place}"


class Heartbeat:
    """While entered, a thread writes where this rank is (`beat`) and watches all ranks.

    lost: called with a rank that is silent for stall_s, and a text. Each rank follows the next one.
    """

    def __init__(
        self, folder: Path, world: World, *, stall_s: float, lost: Callable[[int, str], None]
    ) -> None:
        self._folder, self._lost = folder / FOLDER, lost
        self._rank, self._size, self._stall_s = world.rank, world.size, stall_s
        self._period_s = min(_LONGEST_PERIOD_S, stall_s / 4)
        self._place = (0, "start")
        self._moved = time.monotonic()
        self._reported = False
        self._next, self._next_wrote, self._missed = (self._rank + 1) % self._size, 0, 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._stack = self._path(self._rank).with_suffix(".stack").open("w")

    def __enter__(self) -> Heartbeat:
        self.beat("start", 0)
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._ended.set()
        self._thread.join()
        self._stack.close()

    def beat(self, phase: str, step: int) -> None:
        """Begin a phase of a step; takes some microseconds."""
        self._place, self._moved = (step, phase), time.monotonic()
        faulthandler.dump_traceback_later(self._stall_s, file=self._stack)

    def _watch(self) -> None:
        while not self._ended.wait(self._period_s):
            if self._write():
                self._follow()
            # One period later, so that every rank has written its place.
            stalled = time.monotonic() - self._moved > self._stall_s + self._period_s
            if self._reported and not stalled:
                print(f"moving again: {self._mine()}", flush=True)
            # The lowest rank that still writes reports.
            elif stalled and not self._reported and not any(map(self._fresh, range(self._rank))):
                print(self._report(), flush=True)
            self._reported = stalled

    def _mine(self) -> Beat:
        step, phase = self._place
        idle_s = round(time.monotonic() - self._moved, 1)
        return Beat(self._rank, socket.gethostname(), os.getpid(), step, phase, idle_s)

    def _follow(self) -> None:
        """Count own beats since the last one of the next rank: no clocks, no failed file server."""
        try:
            wrote = self._path(self._next).stat().st_mtime_ns
        except OSError:
            wrote = self._next_wrote
        self._missed = 0 if wrote != self._next_wrote else self._missed + 1
        self._next_wrote = wrote
        silent_s = self._missed * self._period_s
        if self._next != self._rank and silent_s > max(self._stall_s, _SHORTEST_LOSS_S):
            self._lost(self._next, f"wrote no heartbeat for {silent_s:.0f} s: its node is lost")

    def _write(self) -> bool:
        path = self._path(self._rank)
        temporary = path.with_suffix(".new")
        # A full disk ends the run at the next save, with its reason.
        with contextlib.suppress(OSError):
            temporary.write_text(json.dumps(asdict(self._mine())))
            temporary.replace(path)
            return True
        return False

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank-{rank:05d}.json"

    def _fresh(self, rank: int) -> Beat | None:
        """A rank's recent beat. Ages are by the file system: clocks of hosts differ."""
        try:
            now = self._path(self._rank).stat().st_mtime
            age_s = now - self._path(rank).stat().st_mtime
            beat = Beat(**json.loads(self._path(rank).read_text()))
        except (OSError, ValueError, TypeError):
            return None
        return beat if age_s < _SILENT_PERIODS * self._period_s else None

    def _report(self) -> str:
        fresh = {rank: self._fresh(rank) for rank in range(self._size)}
        silent = [rank for rank, beat in fresh.items() if beat is None]
        beats = [beat for beat in fresh.values() if beat is not None]
        first, last = min(b.place for b in beats), max(b.place for b in beats)
        late = [beat for beat in beats if beat.place == first != last]
        waiting = [beat for beat in beats if beat not in late]
        lines = [f"stalled: nothing has moved for {self._stall_s:g} s (train.stall_s)."]
        if silent:
            ranks = ", ".join(map(str, silent[:10]))
            ranks += f" and {len(silent) - 10} more" if len(silent) > 10 else ""
            lines.append(f"  silent: rank(s) {ranks}: dead, or stuck in native code")
        lines += [f"  late: {beat}" for beat in late[:10]]
        if not silent and not late:
            lines.append("  all ranks are at the same place: the network, or a collective")
        lines += [f"  waits: {beat}" for beat in waiting[:1]]
        if len(waiting) > 1:
            lines.append(f"  {len(waiting) - 1} more wait")
        lines.append(f"  stacks of every rank: {self._folder}/rank-*.stack")
        return "\n".join(lines)
