"""Parsed tables of large manifests, which the processes of a machine share.

The first process that opens a manifest of millions of shards parses it; the others wait and map its
arrays, so that the ranks of a node parse it once and its columns are in memory once.

<cache>/tables/<hash of the manifest>/   head.json and one .npy per column (ARVIDEO_CACHE, store.py)
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from arvideo_ds.errors import UserError
from arvideo_ds.files.locks import lock
from arvideo_ds.shards.store import cache_root
from arvideo_ds.shards.table import ShardTable, read_table

# About 100,000 shards. Smaller manifests are parsed in a fraction of a second by every process.
_LARGE = 2**25
# Tables of other manifests that remain; each takes about 110 bytes per shard.
_KEPT = 4
_HEAD = "head.json"


def shared_table(file: BinaryIO, digest: str) -> tuple[dict[str, Any], ShardTable]:
    """`read_table(file)`, once per machine where the manifest is large.

    digest: SHA-256 of the file. Where nothing can be written to the cache, this process parses the
    manifest for itself. Errors: those of `read_table`.
    """
    if os.fstat(file.fileno()).st_size < _LARGE:
        return read_table(file)
    tables = cache_root() / "tables"
    try:
        with lock(tables, f"-{digest[:16]}", wait=True):
            if (found := _open(tables / digest)) is not None:
                return found
            head, table = read_table(file)
            _write(tables / digest, head, table)
        return _open(tables / digest) or (head, table)
    except (OSError, UserError):
        file.seek(0)
        return read_table(file)


def _write(folder: Path, head: dict[str, Any], table: ShardTable) -> None:
    partial = folder.with_name(f"{folder.name}.partial")
    for old in (partial, folder):
        shutil.rmtree(old, ignore_errors=True)
    partial.mkdir()
    for name, column in table.columns().items():
        np.save(partial / f"{name}.npy", column, allow_pickle=False)
    (partial / _HEAD).write_text(json.dumps(head))
    partial.rename(folder)
    others = sorted(folder.parent.glob(f"*/{_HEAD}"), key=lambda path: path.stat().st_mtime)
    for other in others[:-_KEPT]:
        shutil.rmtree(other.parent, ignore_errors=True)  # processes keep what they have mapped


def _open(folder: Path) -> tuple[dict[str, Any], ShardTable] | None:
    """None where the table is missing or incomplete."""
    with contextlib.suppress(OSError, ValueError, EOFError):
        head = json.loads((folder / _HEAD).read_bytes())
        columns = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in ShardTable.COLUMNS
        }
        return head, ShardTable(**columns)
    return None
