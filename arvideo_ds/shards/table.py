"""The shards of a manifest as columns: two million of them open in seconds, in 110 bytes each.

A manifest of a billion videos is half a gigabyte of JSON. It is read block by block, cut between
two shards where `dump_json` begins a line; JSON in another layout is read as a whole.
"""

from __future__ import annotations

import json
import operator
from array import array
from collections.abc import Sequence
from typing import Any, BinaryIO, overload

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import from_json

_BLOCK = 2**20
# Everything before the shards: the names of the classes take most of it.
_MAX_HEAD = 2**26
# JSON has no line breaks within a string, so that these stand between shards alone.
_BEGIN, _BETWEEN, _END = b'\n "shards": [\n', b"\n  },\n", b"\n ]"
_KEYS = ("name", "samples", "bytes", "sha256", "index_sha256")
_COLUMNS = operator.itemgetter(*_KEYS)
_DIGEST = 32
# Videos of a shard, and bytes of one or of all names, that fit the columns.
_MAX_SAMPLES, _MAX_BYTES, _MAX_NAMES, _MAX_NAME = 2**31, 2**62, 2**32, 255


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


class ShardTable(Sequence[Shard]):
    """Shards by their number, like a tuple of them.

    samples (int32) and bytes (int64) are arrays over all shards.
    """

    COLUMNS = ("samples", "bytes", "ends", "names", "digests")

    def __init__(
        self,
        samples: np.ndarray,
        bytes: np.ndarray,  # noqa: A002
        ends: np.ndarray,
        names: np.ndarray,
        digests: np.ndarray,
    ) -> None:
        """Arrays over all shards of int32, int64, and uint32 for the ends of the names in `names`.

        names and digests are uint8; the digests of a shard are those of its tar and its index.
        """
        self.samples, self.bytes, self._ends = samples, bytes, ends
        self._arrays = (names, digests)
        self._names, self._digests = names.data, digests.data

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardTable, tuple(self.columns().values())  # memory views cannot be pickled

    def columns(self) -> dict[str, np.ndarray]:
        """What the constructor takes."""
        values = (self.samples, self.bytes, self._ends, *self._arrays)
        return dict(zip(self.COLUMNS, values, strict=True))

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
        tar, index = (self._digests[start : start + _DIGEST] for start in _digest_places(n))
        return Shard.model_construct(
            name=str(self._names[int(self._ends[n - 1]) if n else 0 : int(self._ends[n])], "utf8"),
            samples=int(self.samples[n]),
            bytes=int(self.bytes[n]),
            sha256=tar.hex(),
            index_sha256=index.hex(),
        )


class _Columns:
    """What is known of the shards read so far."""

    def __init__(self) -> None:
        self.samples, self.bytes, self.ends = array("i"), array("q"), array("I")
        self.names, self.digests = bytearray(), bytearray()
        self._hashes = array("q")

    def add(self, entries: Any) -> None:
        """Errors: ValueError for what is no list of shards, or does not fit."""
        if not isinstance(entries, list) or set(map(type, entries)) - {dict}:
            raise ValueError("shards: no list of objects")
        if not entries:
            return
        if set(map(len, entries)) != {len(_KEYS)}:
            raise ValueError(f"shards: one has other keys than {', '.join(_KEYS)}")
        try:
            names, samples, sizes, tars, indices = zip(*map(_COLUMNS, entries), strict=True)
        except KeyError as error:
            raise ValueError(f"shards: one has no {error}") from None
        self._add_names(names)
        self.samples.extend(_counts("samples", samples, _MAX_SAMPLES))
        self.bytes.extend(_counts("bytes", sizes, _MAX_BYTES))
        digests = np.stack([_digests("sha256", tars), _digests("index_sha256", indices)], axis=1)
        self.digests += digests.tobytes()

    def finish(self) -> ShardTable:
        """Errors: ValueError where two shards have one name."""
        hashes = np.frombuffer(self._hashes, dtype=np.int64)
        hashes.sort()
        twice = hashes[1:][hashes[1:] == hashes[:-1]]
        if len(twice):
            name = next(s.name for s in self.table() if hash(s.name) == int(twice[0]))
            raise ValueError(f"it names {name} several times")
        return self.table()

    def table(self) -> ShardTable:
        def array_of(column: Any, dtype: type) -> np.ndarray:
            return np.frombuffer(column, dtype=dtype)

        return ShardTable(
            samples=array_of(self.samples, np.int32),
            bytes=array_of(self.bytes, np.int64),
            ends=array_of(self.ends, np.uint32),
            names=array_of(self.names, np.uint8),
            digests=array_of(self.digests, np.uint8),
        )

    def _add_names(self, names: tuple[Any, ...]) -> None:
        if set(map(type, names)) != {str}:
            raise ValueError("shards: a name is no text")
        encoded = [name.encode() for name in names]
        joined = b"/" + b"/".join(encoded) + b"/"
        count = len(names)
        wrong = b"\\" in joined or b"\0" in joined or joined.count(b"/") != count + 1
        if wrong or joined.count(b".tar/") != count or b"/.tar/" in joined:
            raise ValueError("shards: a name is not that of a .tar in this folder")
        lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=count)
        ends = len(self.names) + np.cumsum(lengths)
        if lengths.max() > _MAX_NAME or ends[-1] >= _MAX_NAMES:
            raise ValueError("shards: the names are too long")
        self.ends.frombytes(ends.astype(np.uint32).tobytes())
        self.names += b"".join(encoded)
        self._hashes.extend(map(hash, names))


def _counts(key: str, values: tuple[Any, ...], limit: int) -> tuple[int, ...]:
    if set(map(type, values)) != {int} or min(values) < 0 or max(values) >= limit:
        raise ValueError(f"shards: {key} is no number from 0 to {limit - 1}")
    return values


def _digests(key: str, values: tuple[Any, ...]) -> np.ndarray:
    """N x 32 bytes."""
    if set(map(type, values)) != {str} or set(map(len, values)) != {2 * _DIGEST}:
        raise ValueError(f"shards: {key} is no SHA-256")
    digests = np.frombuffer(bytes.fromhex("".join(values)), dtype=np.uint8)
    if digests.size != len(values) * _DIGEST:  # fromhex passes over spaces
        raise ValueError(f"shards: {key} is no SHA-256")
    return digests.reshape(-1, _DIGEST)


def _digest_places(number: int) -> tuple[int, int]:
    first = 2 * _DIGEST * number
    return first, first + _DIGEST


def index_name(shard_name: str) -> str:
    return shard_name.removesuffix(".tar") + ".index.json"


def read_table(file: BinaryIO) -> tuple[dict[str, Any], ShardTable]:
    """The keys of a manifest but for `shards`, and the shards.

    Errors: ValueError where it is no manifest, `OSError` where it cannot be read.
    """
    try:
        return _read_blocks(file)
    except ValueError:  # perhaps only in another layout
        file.seek(0)
        tree, columns = _object(file.read()), _Columns()
        columns.add(tree.pop("shards", None))
        return tree, columns.finish()


def _read_blocks(file: BinaryIO) -> tuple[dict[str, Any], ShardTable]:
    text, columns = b"", _Columns()
    while (found := text.find(_BEGIN)) < 0:
        block = file.read(_BLOCK)
        if not block or len(text) > _MAX_HEAD:
            raise ValueError("it has no shards")
        text += block
    head, text = text[:found], text[found + len(_BEGIN) :]
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
    return tree, columns.finish()


def _object(text: bytes) -> dict[str, Any]:
    try:
        tree = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(tree, dict):
        raise ValueError("it is no JSON object")
    return tree
