"""Files of JSON objects, one a line, that a program appends to while it may be killed.

Each file has one writer (ranks have a file each), which appends whole lines. What a crash left
torn is skipped by the reader with a note, and ended by the next append.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_LISTED = 5
# What this process has noted of each file, so that it is noted once.
_noted: dict[Path, list[int]] = {}


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file, none where there is no file.

    Lines that hold none (cut short, garbled) are skipped; rank 0 prints their number and places.
    """
    if not path.is_file():
        return []
    objects, torn = [], []
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
            torn.append(number)
    _note(path, torn)
    return objects


def append_json_lines(path: Path, objects: Iterable[Mapping[str, Any]]) -> None:
    """Append each object with one write; a torn last line is ended first."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        end = os.fstat(file).st_size
        if end and os.pread(file, 1, end - 1) != b"\n":
            os.write(file, b"\n")
        for facts in objects:
            os.write(file, json.dumps(facts).encode() + b"\n")
    finally:
        os.close(file)


def _note(path: Path, torn: list[int]) -> None:
    if not torn or _noted.get(path) == torn or os.environ.get("RANK", "0") != "0":
        return
    _noted[path] = torn
    listed = ", ".join(map(str, torn[:_LISTED])) + (", ..." if len(torn) > _LISTED else "")
    print(
        f"note: {path}: {len(torn)} line(s) hold no JSON object, as a crash leaves them; skipped: "
        f"line {listed}",
        file=sys.stderr,
        flush=True,
    )
