"""SHA-256 of files and of facts, as `sha256sum` computes it. Needs no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from arvideo_ds.host import available_cores

_BLOCK = 1 << 20
_THREADS = 8


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return sha256_of_file(file)


def sha256_of_file(file: BinaryIO) -> str:
    """SHA-256 of the rest of an open file, in hexadecimal digits."""
    digest = hashlib.sha256()
    while block := file.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest()


def sha256_of_facts(facts: Mapping[str, Any]) -> str:
    """SHA-256 of facts as JSON, independent of their order."""
    plain = json.loads(json.dumps(facts))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def changed_files(folder: Path, expected: Mapping[str, str], names: Iterable[str]) -> list[str]:
    """The names of files that cannot be read or have another SHA-256 than expected."""

    def changed(name: str) -> bool:
        try:
            return sha256_of(folder / name) != expected[name]
        except (OSError, KeyError):
            return True

    names = list(names)
    # Hashing releases the interpreter lock; other processes of the machine need cores too.
    threads = max(1, min(_THREADS, len(available_cores()), len(names)))
    with ThreadPoolExecutor(threads) as pool:
        return [name for name, bad in zip(names, pool.map(changed, names), strict=True) if bad]
