"""Shards on disk: the manifest, the index beside each shard, and reading a sample by its offset.

<folder>/
  manifest.json                     data set, settings, and name, size and hash of every shard
  <dataset>-<split>-000000.tar      plain WebDataset: <key>.mp4 + <key>.json
  <dataset>-<split>-000000.index.json   where each video of that shard lies
  rejects.jsonl                     every video left out, with the reason
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    SkipValidation,
    ValidationError,
    model_serializer,
)
from tqdm import tqdm

from arvideo_ds.errors import UserError
from arvideo_ds.files.checksums import sha256_of_file
from arvideo_ds.shards.store import FetchError, WrongSizeError, open_store
from arvideo_ds.shards.table import Shard, ShardTable, index_name
from arvideo_ds.shards.table_cache import shared_table
from arvideo_ds.shards.video_files import how_to_make_shards, read_at

__all__ = ["Shard", "ShardTable", "index_name"]  # of table.py, beside those below

VERSION = 2
MANIFEST = "manifest.json"
REJECTS = "rejects.jsonl"
# What the manifest of somebody else's tars says of their videos (foreign.py).
AS_FOUND = "as found"
# Between the names of the data sets (or splits) of merged shards: kinetics400+ssv2.
JOINED_BY = "+"
# Open files and parsed indices that one reader keeps; a window of the order spans few shards.
_OPEN_SHARDS = 64
_MAX_FRAMES = 2**31 - 1
# Threads that ask a file server at once, how many questions they get at a time, and after how many
# seconds people see how far they are.
_THREADS, _AT_ONCE, _SHOWN_AFTER_S = 16, 512, 5


# Names of the classes in the order of their numbers: of the one label that samples have, or, where
# they have several, of each label set by its name.
ClassNames = Sequence[str] | Mapping[str, Sequence[str]]
# Keys that are written only where samples have several labels.
_OF_SETS = ("label_sets", "labels_by_set")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Shards of one label have the bytes, and so the hashes, that they had before sets."""
        content: dict[str, Any] = dump(self)
        return {k: v for k, v in content.items() if k not in _OF_SETS or v is not None}


class Reject(_Record):
    """A video left out."""

    source_path: str
    reason: str
    message: str


class IndexedSample(_Record):
    """Where one video is in its shard, and what the loader must know to sample it."""

    key: str
    suffix: str
    offset: int
    bytes: int
    # Of the video, compared at every read.
    crc32: int
    num_frames: int
    label: int | None
    # Its number in each of the manifest's label sets.
    labels_by_set: dict[str, int] | None = None


class ShardIndex(_Record):
    """The sidecar of a shard; its presence says that the shard is complete."""

    version: int = VERSION
    # Hash of everything that decides the shard's content; a rerun compares it.
    inputs: str
    shard_bytes: int
    shard_sha256: str
    samples: tuple[IndexedSample, ...]
    rejects: tuple[Reject, ...]


class Manifest(_Record):
    """Contents of manifest.json."""

    version: int = VERSION
    dataset: str
    split: str | None
    labels: tuple[str, ...] | None
    # Where samples have several labels (a verb and a noun): the names of each set. `labels` is the
    # one that tools go by which know one label.
    label_sets: dict[str, tuple[str, ...]] | None = None
    settings: dict[str, str | int | None]
    num_samples: int
    num_rejects: int
    # A tuple where they are written, a `ShardTable` where they are read.
    shards: SkipValidation[Sequence[Shard]]

    @property
    def datasets(self) -> tuple[str, ...]:
        """The data sets that the samples come from: several where shards were merged."""
        return tuple(self.dataset.split(JOINED_BY))

    def class_names(self, heads: Sequence[str] | None = None) -> ClassNames | None:
        """Names of `labels`, or of the label sets called `heads`; None where there are none.

        Errors: `UserError` for a set that the shards do not have.
        """
        if heads is None:
            return self.labels
        sets = self.label_sets or {}
        for name in heads:
            if name not in sets:
                known = ", ".join(sets) or ("one label each, no sets" if self.labels else "none")
                raise UserError(
                    f"finetune.heads names the label set '{name}', but the shards of "
                    f"{self.dataset} have {known}. Make them again with `arvideo shards`, whose "
                    "earlier versions stored one label, or correct the key."
                )
        return {name: sets[name] for name in heads}


def by_set(names: ClassNames | None) -> dict[str, list[str]]:
    """The names of every label set; the one label of a sample is the set ''."""
    if isinstance(names, Mapping):
        return {name: list(classes) for name, classes in names.items()}
    return {"": list(names or ())}


def require_same_labels(
    first: str, labels: ClassNames | None, second: str, others: ClassNames | None
) -> None:
    """Errors: `UserError` where two class lists differ, or their order; it says in what."""
    known, asked = by_set(labels), by_set(others)
    for name in {**known, **asked}:
        called = [f"{what} ({name})" if name else what for what in (first, second)]
        _require_same_classes(called[0], known.get(name, []), called[1], asked.get(name, []))


def _require_same_classes(first: str, known: list[str], second: str, asked: list[str]) -> None:
    if known == asked:
        return
    alone = [(name, first) for name in known if name not in asked]
    alone += [(name, second) for name in asked if name not in known]
    what = f"'{alone[0][0]}' only in {alone[0][1]}" if alone else "in another order"
    raise UserError(
        f"{first} and {second} have different labels ({len(known)} and {len(asked)}; {what}), so "
        "their label numbers do not mean the same. Make both from one set of class names "
        "(arvideo shards --labels)."
    )


class AlteredError(Exception):
    """A video whose bytes in the shard changed after they were written."""


class UnreachableError(UserError):
    """A file of the shards that cannot be read now, by fault of a server, a network or a disk."""


class ShardSet:
    """A folder of shards (or its URL), opened: counts, labels, hash, samples by (shard, place).

    Shards are opened on first use, in whatever process uses them. Errors: `UserError` when the
    manifest is missing or unreadable, or a shard is not the one that the manifest describes;
    `UnreachableError` where a file cannot be read at the moment.
    """

    def __init__(self, folder: str | Path) -> None:
        # As the user said it, and where the files are (behind a URL: its cache).
        self.name = str(folder)
        store = open_store(folder)
        try:
            with store.newest(MANIFEST).open("rb") as file:
                # Identifies the data set in checkpoints and results.
                self.hash = sha256_of_file(file)
                file.seek(0)
                self.manifest, self.samples_of_shards = _parse_manifest(file, self.hash, self.name)
        except FileNotFoundError:
            raise UserError(
                f"there are no shards in {folder} (no {MANIFEST}). {how_to_make_shards(self.name)}"
            ) from None
        except OSError as error:
            raise UserError(f"cannot read {folder}/{MANIFEST}: {error}.") from None
        self._store = store.of(self.hash)
        self.folder = self._store.folder

    @property
    def num_samples(self) -> int:
        return self.manifest.num_samples

    @property
    def is_remote(self) -> bool:
        """Behind a URL, the same for every machine."""
        return not self._store.permanent

    @functools.lru_cache(maxsize=_OPEN_SHARDS)  # noqa: B019  lives as long as its reader
    def index(self, shard: int) -> ShardIndex:
        """The parsed sidecar of a shard."""
        entry = self.manifest.shards[shard]
        where = f"{self.name}/{entry.index_name}"
        data = self._index_bytes(entry)
        if hashlib.sha256(data).hexdigest() != entry.index_sha256:
            # A cached file may be damaged where the server's is not.
            self._store.discard(entry.index_name)
            data = self._index_bytes(entry)
            if hashlib.sha256(data).hexdigest() != entry.index_sha256:
                raise UserError(
                    f"{where} was altered after the manifest was written; make it again."
                )
        try:
            index = ShardIndex.model_validate_json(data)
            _require_sound(index, entry, self.manifest)
        except ValueError as error:
            raise UserError(
                f"{where} is no index of {entry.name} ({_reason(error)}); make the shards again."
            ) from None
        return index

    def read(self, shard: int, sample: IndexedSample) -> bytes:
        """The bytes of one video. Errors: `AlteredError` where they are not those once written."""
        data = self.read_bytes(shard, sample.offset, sample.bytes)
        if len(data) != sample.bytes or zlib.crc32(data) != sample.crc32:
            name = self.manifest.shards[shard].name
            raise AlteredError(
                f"its bytes in {name} are not those once written; copy the shard again"
            )
        return data

    def read_bytes(self, shard: int, offset: int, size: int) -> bytes:
        """Bytes of the tar as they are; fewer where it ends before."""
        file = self._keep_open(shard) if self._store.permanent else self._open(shard)
        try:
            return read_at(file.fileno(), size, offset)
        except OSError as error:
            name = self.manifest.shards[shard].name
            raise UnreachableError(f"cannot read {self.name}/{name}: {error}.") from None

    def path(self, shard: int) -> Path:
        """The tar of a shard on this machine, fetched if it lies behind a URL."""
        entry = self.manifest.shards[shard]
        with self._explained(entry):
            return self._store.path(entry.name, entry.bytes)

    def fetch_ahead(self, shard: int) -> None:
        """The shard is needed soon: behind a URL, it is fetched in the background."""
        if not self._store.permanent:
            entry = self.manifest.shards[shard]
            self._store.fetch_ahead(entry.index_name)
            self._store.fetch_ahead(entry.name, entry.bytes)

    def require_own(self) -> None:
        """Errors: `UserError` for tars of others, which have no facts for tools to work with."""
        if self.manifest.settings.get("video") == AS_FOUND:
            raise UserError(
                f"{self.name} holds tars that `arvideo index` made readable for training; this "
                "tool needs shards of `arvideo shards`."
            )

    def check_sizes(self) -> None:
        """Compare every shard's size with the manifest, before any work begins."""
        each_in_threads(self._require_size, len(self.manifest.shards), f"sizes in {self.name}")

    def check(self, *, limit_s: float) -> int:
        """Compare every shard's size, and the indices as far as `limit_s` allows; how many.

        Errors: `UserError` for the first that is not what the manifest says.
        """
        self.check_sizes()
        what = f"indices in {self.name}"
        return each_in_threads(self.index, len(self.manifest.shards), what, limit_s=limit_s)

    def _index_bytes(self, entry: Shard) -> bytes:
        with self._explained(entry, entry.index_name):
            descriptor = self._store.open(entry.index_name)
            with open(descriptor, "rb") as file:  # noqa: PTH123
                return file.read()

    @functools.lru_cache(maxsize=_OPEN_SHARDS)  # noqa: B019
    def _keep_open(self, shard: int) -> _File:
        return self._open(shard)

    def _open(self, shard: int) -> _File:
        entry = self.manifest.shards[shard]
        with self._explained(entry):
            return _File(self._store.open(entry.name, entry.bytes))

    def _require_size(self, shard: int) -> None:
        entry = self.manifest.shards[shard]
        with self._explained(entry):
            size = self._store.size(entry.name)
        if size not in (None, entry.bytes):  # not every server says a size
            raise self._truncated(entry, size)

    @contextlib.contextmanager
    def _explained(self, entry: Shard, name: str | None = None) -> Iterator[None]:
        """Errors of the store about a shard, or its file `name`, as words for people."""
        try:
            yield
        except FetchError as error:
            raise UnreachableError(f"{error}.") from None
        except WrongSizeError as error:
            raise self._truncated(entry, error.size) from None
        except OSError as error:
            raise UserError(
                f"cannot open {self.name}/{name or entry.name}: {error.strerror or error}. Copy it "
                "again, or make the shards again."
            ) from None

    def _truncated(self, entry: Shard, size: int | None) -> UserError:
        return UserError(
            f"shard {self.name}/{entry.name} has {size} bytes, the manifest says {entry.bytes}: it "
            "was truncated or altered. Copy it again, or delete it and rerun make_shards."
        )


def _parse_manifest(file: BinaryIO, digest: str, folder: str) -> tuple[Manifest, np.ndarray]:
    """A manifest, and the samples of each shard (int32).

    Errors: `UserError` where it is no manifest, or contradicts itself; `OSError`.
    """
    try:
        tree, shards = shared_table(file, digest)
        if (version := tree.get("version")) != VERSION:
            raise ValueError(f"it has version {version}, this program reads version {VERSION}")
        manifest = Manifest.model_validate(tree | {"shards": shards})
        total = int(shards.samples.sum(dtype=np.int64))
        if manifest.num_samples != total or manifest.num_rejects < 0:
            raise ValueError(
                f"it says {manifest.num_samples} samples and {manifest.num_rejects} rejects, its "
                f"shards have {total} samples"
            )
    except ValueError as error:
        raise UserError(
            f"{folder}/{MANIFEST} is no manifest that this version reads ({_reason(error)}); make "
            "the shards again, or copy the manifest again."
        ) from None
    return manifest, shards.samples


def _require_sound(index: ShardIndex, entry: Shard, manifest: Manifest) -> None:
    """Errors: ValueError where an index contradicts the manifest or leads out of its shard."""
    samples = index.samples
    if index.version != VERSION:
        raise ValueError(f"it has version {index.version}, this program reads version {VERSION}")
    if (len(samples), index.shard_bytes) != (entry.samples, entry.bytes):
        raise ValueError(
            f"it has {len(samples)} samples in {index.shard_bytes} bytes, the manifest says "
            f"{entry.samples} in {entry.bytes}"
        )
    if len({sample.key for sample in samples}) != len(samples):
        raise ValueError("a key comes twice")
    numbers = {"": len(manifest.labels or ())}
    numbers |= {name: len(names) for name, names in (manifest.label_sets or {}).items()}
    for sample in samples:
        if sample.offset < 0 or sample.bytes < 0 or sample.offset + sample.bytes > entry.bytes:
            raise ValueError(f"{sample.key} lies outside of the shard")
        if not 0 < sample.num_frames <= _MAX_FRAMES:
            raise ValueError(f"{sample.key} has {sample.num_frames} frames")
        own = {"": sample.label, **(sample.labels_by_set or {})}
        for name, label in own.items():
            if label is not None and not 0 <= label < numbers.get(name, 0):
                raise ValueError(
                    f"{sample.key} has label {label}{f' of {name}' if name else ''}, the manifest "
                    f"{numbers.get(name, 0)} labels"
                )


def _reason(error: ValueError) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return f"{where}: {first['msg']}" if where else first["msg"]
    return " ".join(str(error).split())[:300]


def each_in_threads(
    function: Callable[[int], Any], count: int, what: str, *, limit_s: float = math.inf
) -> int:
    """Call a function that waits for disks or servers with 0 .. count-1; how many times it was.

    limit_s: nothing is begun after it. Errors: the first of the function's.
    """
    begun = time.monotonic()
    with (
        ThreadPoolExecutor(min(_THREADS, max(1, count))) as pool,
        tqdm(total=count, desc=what, delay=_SHOWN_AFTER_S, leave=False) as bar,
    ):
        for start in range(0, count, _AT_ONCE):
            if time.monotonic() - begun > limit_s:
                return start
            numbers = range(start, min(start + _AT_ONCE, count))
            bar.update(sum(1 for _ in pool.map(function, numbers)))
    return count


class _File:
    """A read-only file descriptor that closes with its owner (the cache)."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor

    def __del__(self) -> None:
        os.close(self._descriptor)


def dump_json(record: BaseModel) -> bytes:
    """JSON bytes that depend on the content alone."""
    return (json.dumps(record.model_dump(), indent=1, ensure_ascii=False) + "\n").encode()
