"""Atomic writes: a file is complete or absent, even if its writer dies."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from arvideo_ds.errors import UserError

# Suffix of incomplete files; the next writer to the folder may delete them.
PARTIAL = ".partial"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path`; the file that the block writes there is synced and renamed to `path`.

    After an error, `path` is unchanged and the partial file is deleted.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def explained_when_full(
    folder: Path, goes_on: str = "after the last complete shard"
) -> Iterator[None]:
    """Turn a full disk into a `UserError`. goes_on: where the same command goes on."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{folder} is full ({error.strerror}). Free some space; the same command goes on "
            f"{goes_on}."
        ) from None


def write_bytes(path: Path, data: bytes) -> None:
    with replacing(path) as partial:
        partial.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write JSON with an indent of 1, and null for NaN and infinity."""
    write_text(path, json.dumps(finite(value), indent=1) + "\n")


def finite(value: Any) -> Any:
    """The value with None for NaN and infinity, at any depth."""
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
