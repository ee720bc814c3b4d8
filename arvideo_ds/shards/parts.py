"""One set of shards, written in parts by several processes, on one machine or on many.

Part 3 of 8 writes every eighth shard from the third on. Which process writes a shard changes none
of its bytes, so a later command may have another number of parts, or none. Every part shares the
lock of the folder, which keeps out commands without parts, and locks a file of its own. The name of
that file has the number of parts and a hash of the inputs, so that parts with another number or
other inputs refuse each other before they write.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from arvideo_ds.errors import UserError
from arvideo_ds.files.atomic import PARTIAL
from arvideo_ds.files.locks import LOCK, is_locked, lock
from arvideo_ds.shards.table import index_name

_PART, _END = "-part-", "-parts-end"
# A listing of the folder takes at most this share of the time, and is not made more often.
_LISTING_SHARE, _LISTING_EVERY_S = 0.01, 30.0


@dataclass(frozen=True)
class Part:
    """Part `number` of `total`, from 1."""

    number: int
    total: int

    def __str__(self) -> str:
        return f"{self.number}/{self.total}"

    def of(self, names: Sequence[str]) -> Sequence[str]:
        """Every `total`th name: all parts have equal work."""
        return names[self.number - 1 :: self.total]


def parse_part(text: str, environment: Mapping[str, str] = os.environ) -> Part:
    """A part from I/N, or from a task of srun for "slurm". Errors: `UserError`."""
    if text == "slurm":
        try:
            # Not SLURM_NTASKS, which batch scripts have as well.
            total = int(environment["SLURM_STEP_NUM_TASKS"])
            return Part(int(environment["SLURM_PROCID"]) + 1, total)
        except KeyError:
            raise UserError(
                "--part slurm takes its numbers from srun, which did not start this process. Use "
                "srun --nodes 8 arvideo shards ..., or in a job array --part "
                "$SLURM_ARRAY_TASK_ID/8."
            ) from None
    match = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
    part = Part(*map(int, match.groups())) if match else Part(0, 0)
    if not 1 <= part.number <= part.total:
        raise UserError(
            f"--part {text} must be a part and the number of parts, from 1/8 to 8/8, or slurm."
        )
    return part


def lock_part(folder: Path, part: Part, inputs: str) -> contextlib.ExitStack:
    """Lock a part until `close`. inputs: hash of all that determines the shards.

    Errors: `UserError` where another process writes this part, another number of parts, parts of
    other inputs, or the folder without parts.
    """
    deal = f"-of-{part.total}-{inputs[:16]}"
    with contextlib.ExitStack() as held:
        held.enter_context(lock(folder, shared=True))
        held.enter_context(lock(folder, f"{_PART}{part.number}{deal}", what=f"part {part} "))
        # After its own lock: of two that start together, at least one sees the other.
        for path in folder.glob(f"{LOCK}{_PART}*"):
            if not path.name.endswith(deal) and is_locked(path):
                owner = path.read_text().strip() or "another run"
                raise UserError(
                    f"{owner} is writing part {_part_of(path)} to {folder}, not one of "
                    f"{part.total}, or with other videos, labels, settings or decoders. Give all "
                    "parts the same options, on machines with the same packages; wait for it, or "
                    "choose another folder (--output)."
                )
        return held.pop_all()


def lock_end(folder: Path) -> contextlib.ExitStack:
    """Lock the end of all parts until `close`; waits for another process that ends them."""
    with contextlib.ExitStack() as held:
        held.enter_context(lock(folder, shared=True))
        held.enter_context(lock(folder, _END, wait=True))
        return held.pop_all()


def remove_leftovers(folder: Path) -> None:
    """Delete the locks of parts and partial files, in a folder that is locked without parts."""
    # Nobody has these locks open: a part has locked the folder before.
    for pattern in (f"{LOCK}{_PART}*", f"{LOCK}{_END}", f"*{PARTIAL}"):
        for path in folder.glob(pattern):
            path.unlink()


def remove_leftovers_of_all(folder: Path) -> None:
    """The same by the last part; while another one ends, it is left to that one."""
    with contextlib.suppress(UserError), lock(folder):
        remove_leftovers(folder)


def missing_shards(folder: Path, names: Sequence[str]) -> list[str]:
    """The shards without an index, from one listing of the folder."""
    found = {path.name for path in folder.iterdir()}
    return [name for name in names if index_name(name) not in found]


def require_all(folder: Path, names: Sequence[str], missing: Sequence[str]) -> None:
    """Errors: `UserError` where shards are missing, with the parts to repeat."""
    if not missing:
        return
    locks = sorted(folder.glob(f"{LOCK}{_PART}*"), key=lambda path: path.stat().st_mtime)
    repeat = ""
    if locks:
        total = _part_of(locks[-1]).total
        gone = set(missing)
        numbers = sorted({n % total + 1 for n, name in enumerate(names) if name in gone})
        listed = ",".join(map(str, numbers))
        repeat = f"Repeat part {listed} of {total}, except those that still run, or run "
    raise UserError(
        f"{len(missing):,} of {len(names):,} shards in {folder} are missing, such as "
        f"{missing[0]}. {repeat or 'Run '}the command without --part and --finish, which writes "
        "all that is missing."
    )


class Progress:
    """The shards of all parts, counted from time to time."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self._folder, self._names = folder, names
        self._begun = self._due = time.monotonic()
        self._before = len(missing_shards(folder, names))

    def show(self, bar: tqdm) -> None:
        """Write them into the bar, with the time that all parts need at their present rate."""
        now = time.monotonic()
        if now < self._due:
            return
        left = len(missing_shards(self._folder, self._names))
        took = time.monotonic() - now
        self._due = now + max(_LISTING_EVERY_S, took / _LISTING_SHARE)
        text = f"all parts {len(self._names) - left:,}/{len(self._names):,} shards"
        if self._before > left:
            eta = left * (now - self._begun) / (self._before - left)
            text += f", {tqdm.format_interval(eta)} left"
        bar.set_postfix_str(text, refresh=False)


def _part_of(path: Path) -> Part:
    """The part of a lock's file."""
    number, _, rest = path.name.removeprefix(f"{LOCK}{_PART}").partition("-of-")
    return Part(int(number), int(rest.partition("-")[0]))
