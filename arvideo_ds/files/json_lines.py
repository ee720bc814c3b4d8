"""JSON Lines files that survive the death of their writer.

Each file has one writer, which appends whole lines. After a crash, the reader skips an incomplete
line with a note, and the next append ends it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_LISTED = 5
# The lines of each file that this process has reported.
_reported: dict[Path, list[int]] = {}


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file, none for a missing file.

    Skips lines without an object (incomplete, damaged); rank 0 prints their number and places.
    """
    if not path.is_file():
        return []
    objects, damaged = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line:
            continue
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            objects.append(value)
        else:
            damaged.append(number)
    _report(path, damaged)
    return objects


def append_json_lines(path: Path, objects: Iterable[Mapping[str, Any]]) -> None:
    """Append each object with one write; first end an incomplete last line."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        end = os.fstat(file).st_size
        if end and os.pread(file, 1, end - 1) != b"\n":
            os.write(file, b"\n")
        for facts in objects:
            os.write(file, json.dumps(facts).encode() + b"\n")
    finally:
        os.close(file)


def _report(path: Path, damaged: list[int]) -> None:
    if not damaged or _reported.get(path) == damaged or os.environ.get("RANK", "0") != "0":
        return
    _reported[path] = damaged
    listed = ", ".join(map(str, damaged[:_LISTED])) + (", ..." if len(damaged) > _LISTED else "")
    note = f"note: {path}: {len(damaged)} line(s) without a JSON object skipped (after a crash)"
    print(f"{note}: line {listed}", file=sys.stderr, flush=True)
