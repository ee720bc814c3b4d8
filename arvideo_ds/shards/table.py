"""The shards of a manifest as columns: two million of them open in seconds, in 110 bytes each.

A manifest of a billion videos is half a gigabyte of JSON. It is read in blocks, cut between two
shards where `dump_json` begins a line; JSON in another layout is read as a whole. The processes of
a machine share the columns of a large manifest: the first one parses it, the others map its arrays.

<cache>/tables/<hash of the manifest>/   head.json and one .npy per column (ARVIDEO_CACHE, store.py)
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import operator
import os
import re
import shutil
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import from_json

from arvideo_ds.errors import UserError
from arvideo_ds.files.locks import lock
from arvideo_ds.shards.store import cache_root

_BLOCK = 2**20
# Largest text before the shards, which is mostly class names.
_MAX_HEAD = 2**26
# JSON strings have no line breaks, so these occur only between shards.
_BEGIN, _BETWEEN, _END = b'\n "shards": [\n', b"\n  },\n", b"\n ]"
_KEYS = ("name", "samples", "bytes", "sha256", "index_sha256")
_values_of = operator.itemgetter(*_KEYS)
_is_name = re.compile(r"[^/\\\0]+\.tar").fullmatch
_DIGEST = 32
# Limits of the columns: videos of a shard, bytes of one shard, of all names and of one name.
_MAX_SAMPLES, _MAX_BYTES, _MAX_NAMES, _MAX_NAME = 2**31, 2**62, 2**32, 255
# About 100,000 shards. Every process parses smaller manifests itself, in a fraction of a second.
_LARGE = 2**25
# Number of cached tables; each takes about 110 bytes per shard.
_KEPT = 4
_HEAD = "head.json"


class Shard(BaseModel):
    """An entry of the manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # A file directly in the folder: nothing outside of it is ever opened.
    name: str = Field(pattern=r"^[^/\\]+\.tar$")
    samples: int
    bytes: int
    sha256: str
    index_sha256: str

    @property
    def index_name(self) -> str:
        return index_name(self.name)


def index_name(shard_name: str) -> str:
    return shard_name.removesuffix(".tar") + ".index.json"


@dataclasses.dataclass(frozen=True, eq=False)
class ShardTable(Sequence[Shard]):
    """N shards by their number, like a tuple of them.

    samples: int32, N. bytes: int64, N. ends: uint32, N, of each name in `names` (uint8). digests:
    uint8, 64 N, SHA-256 of each tar and of its index.
    """

    samples: np.ndarray
    bytes: np.ndarray
    ends: np.ndarray
    names: np.ndarray
    digests: np.ndarray

    def __len__(self) -> int:
        return len(self.samples)

    @overload
    def __getitem__(self, number: int) -> Shard: ...
    @overload
    def __getitem__(self, number: slice) -> tuple[Shard, ...]: ...
    def __getitem__(self, number: int | slice) -> Shard | tuple[Shard, ...]:
        if isinstance(number, slice):
            return tuple(self[n] for n in range(len(self))[number])
        n = range(len(self))[number]
        digests = self.digests[2 * _DIGEST * n : 2 * _DIGEST * (n + 1)].tobytes()
        return Shard.model_construct(
            name=self.names[self.ends[n - 1] if n else 0 : self.ends[n]].tobytes().decode(),
            samples=int(self.samples[n]),
            bytes=int(self.bytes[n]),
            sha256=digests[:_DIGEST].hex(),
            index_sha256=digests[_DIGEST:].hex(),
        )


class _Columns:
    """Growing columns of a `ShardTable`."""

    def __init__(self) -> None:
        self._samples, self._bytes, self._ends = array("i"), array("q"), array("I")
        self._names, self._digests, self._hashes = bytearray(), bytearray(), array("q")

    def add(self, entries: Any) -> None:
        """Errors: ValueError for anything but a list of shards that fit the columns."""
        if not isinstance(entries, list) or set(map(type, entries)) - {dict}:
            raise ValueError("shards: not a list of objects")
        if not entries:
            return
        if set(map(len, entries)) != {len(_KEYS)}:
            raise ValueError(f"shards: one has other keys than {', '.join(_KEYS)}")
        try:
            names, samples, sizes, tars, indices = zip(*map(_values_of, entries), strict=True)
        except KeyError as error:
            raise ValueError(f"shards: one has no {error}") from None
        self._add_names(names)
        self._samples.extend(_counts("samples", samples, _MAX_SAMPLES))
        self._bytes.extend(_counts("bytes", sizes, _MAX_BYTES))
        digests = np.stack([_digests("sha256", tars), _digests("index_sha256", indices)], axis=1)
        self._digests += digests.tobytes()

    def table(self) -> ShardTable:
        """Errors: ValueError if two shards have the same name."""
        table = ShardTable(
            samples=np.frombuffer(self._samples, dtype=np.int32),
            bytes=np.frombuffer(self._bytes, dtype=np.int64),
            ends=np.frombuffer(self._ends, dtype=np.uint32),
            names=np.frombuffer(self._names, dtype=np.uint8),
            digests=np.frombuffer(self._digests, dtype=np.uint8),
        )
        hashes = np.frombuffer(self._hashes, dtype=np.int64)
        hashes.sort()
        twice = hashes[1:][hashes[1:] == hashes[:-1]]
        if len(twice):
            name = next(shard.name for shard in table if hash(shard.name) == int(twice[0]))
            raise ValueError(f"it names {name} several times")
        return table

    def _add_names(self, names: tuple[Any, ...]) -> None:
        if set(map(type, names)) != {str}:
            raise ValueError("shards: a name is not a text")
        if not all(map(_is_name, names)):
            raise ValueError("shards: a name is not that of a .tar in this folder")
        encoded = [name.encode() for name in names]
        lengths = np.fromiter(map(len, encoded), dtype=np.int64)
        ends = len(self._names) + np.cumsum(lengths)
        if lengths.max() > _MAX_NAME or ends[-1] >= _MAX_NAMES:
            raise ValueError("shards: the names are too long")
        self._ends.frombytes(ends.astype(np.uint32).tobytes())
        self._names += b"".join(encoded)
        self._hashes.extend(map(hash, names))


def _counts(key: str, values: tuple[Any, ...], limit: int) -> tuple[int, ...]:
    if set(map(type, values)) != {int} or min(values) < 0 or max(values) >= limit:
        raise ValueError(f"shards: {key} is not a number from 0 to {limit - 1}")
    return values


def _digests(key: str, values: tuple[Any, ...]) -> np.ndarray:
    """N x 32 bytes."""
    if set(map(type, values)) == {str} and set(map(len, values)) == {2 * _DIGEST}:
        digests = np.frombuffer(bytes.fromhex("".join(values)), dtype=np.uint8)
        if digests.size == len(values) * _DIGEST:  # fromhex skips spaces
            return digests.reshape(-1, _DIGEST)
    raise ValueError(f"shards: {key} is not a SHA-256")


def read_table(file: BinaryIO) -> tuple[dict[str, Any], ShardTable]:
    """The keys of a manifest except `shards`, and the shards.

    Errors: ValueError for an invalid manifest, `OSError`.
    """
    try:
        return _read_blocks(file)
    except ValueError:  # perhaps only in another layout
        file.seek(0)
        tree, columns = _object(file.read()), _Columns()
        columns.add(tree.pop("shards", None))
        return tree, columns.table()


def _read_blocks(file: BinaryIO) -> tuple[dict[str, Any], ShardTable]:
    text, columns = b"", _Columns()
    while (begin := text.find(_BEGIN)) < 0:
        block = file.read(_BLOCK)
        if not block or len(text) > _MAX_HEAD:
            raise ValueError("it has no shards")
        text += block
    head, text = text[:begin], text[begin + len(_BEGIN) :]
    while block := file.read(_BLOCK):
        text += block
        cut = text.rfind(_BETWEEN)
        if cut >= 0:
            stop = cut + len(_BETWEEN) - 2  # after the brace, before the comma
            columns.add(from_json(b"[" + text[:stop] + b"]", cache_strings="keys"))
            text = text[stop + 2 :]
    end = text.find(_END)
    columns.add(from_json(b"[" + text[: max(end, 0)] + b"]"))
    tree = _object(head + b' "shards": []' + text[end + len(_END) :])
    tree.pop("shards")
    return tree, columns.table()


def _object(text: bytes) -> dict[str, Any]:
    try:
        tree = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(tree, dict):
        raise ValueError("it is not a JSON object")
    return tree


def shared_table(file: BinaryIO, digest: str) -> tuple[dict[str, Any], ShardTable]:
    """`read_table(file)`, once per machine for a large manifest if the cache is writable.

    digest: SHA-256 of the file. Errors: those of `read_table`.
    """
    if os.fstat(file.fileno()).st_size < _LARGE:
        return read_table(file)
    tables = cache_root() / "tables"
    try:
        with lock(tables, f"-{digest[:16]}", wait=True):
            if (cached := _open_table(tables / digest)) is not None:
                return cached
            head, table = read_table(file)
            _write_table(tables / digest, head, table)
        return _open_table(tables / digest) or (head, table)
    except (OSError, UserError):
        file.seek(0)
        return read_table(file)


def _write_table(folder: Path, head: dict[str, Any], table: ShardTable) -> None:
    partial = folder.with_name(f"{folder.name}.partial")
    for old in (partial, folder):
        shutil.rmtree(old, ignore_errors=True)
    partial.mkdir()
    for name, column in vars(table).items():
        np.save(partial / f"{name}.npy", column, allow_pickle=False)
    (partial / _HEAD).write_text(json.dumps(head))
    partial.rename(folder)
    tables = sorted(folder.parent.glob(f"*/{_HEAD}"), key=lambda path: path.stat().st_mtime)
    for old in tables[:-_KEPT]:
        shutil.rmtree(old.parent, ignore_errors=True)  # processes keep what they have mapped


def _open_table(folder: Path) -> tuple[dict[str, Any], ShardTable] | None:
    """None for a missing or incomplete table."""
    with contextlib.suppress(OSError, ValueError, EOFError):
        head = json.loads((folder / _HEAD).read_bytes())
        columns = {
            field.name: np.load(folder / f"{field.name}.npy", mmap_mode="r", allow_pickle=False)
            for field in dataclasses.fields(ShardTable)
        }
        return head, ShardTable(**columns)
    return None
