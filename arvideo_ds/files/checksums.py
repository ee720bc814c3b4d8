"""SHA-256 of files and facts: what was written is what is read. Needs no torch.

SHA-256 as of the shards' manifest, so that `sha256sum` checks any file by hand; processors of the
last years have instructions for it.
"""

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
    """SHA-256 of what JSON keeps of some facts, whatever their order."""
    plain = json.loads(json.dumps(facts))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def changed_files(folder: Path, expected: Mapping[str, str], names: Iterable[str]) -> list[str]:
    """Those of the named files that cannot be read or have another SHA-256 than expected."""

    def changed(name: str) -> bool:
        try:
            return sha256_of(folder / name) != expected[name]
        except (OSError, KeyError):
            return True

    names = list(names)
    # Hashing releases the interpreter; this process may be one of several on the machine.
    threads = max(1, min(_THREADS, len(available_cores()), len(names)))
    with ThreadPoolExecutor(threads) as pool:
        verdicts = list(pool.map(changed, names))
    return [name for name, verdict in zip(names, verdicts, strict=True) if verdict]
