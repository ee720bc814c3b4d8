"""Shards on disk: manifest, index of each shard, and reading a sample by its offset.

<folder>/
  manifest.json                     data set, settings, and name, size and hash of every shard
  <dataset>-<split>-000000.tar      plain WebDataset: <key>.mp4 + <key>.json
  <dataset>-<split>-000000.index.json   offset and size of each video in that shard
  rejects.jsonl                     every rejected video, with the reason
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
import pydantic
from pydantic import BaseModel, ConfigDict, SkipValidation, ValidationError
from tqdm import tqdm

from arvideo_ds.errors import UserError
from arvideo_ds.files.checksums import sha256_of_file
from arvideo_ds.shards.store import FetchError, WrongSizeError, open_store
from arvideo_ds.shards.table import Shard, ShardTable, index_name, shared_table
from arvideo_ds.shards.video_files import how_to_make_shards, read_at

__all__ = ["Shard", "ShardTable", "index_name"]  # of table.py, beside those below

VERSION = 2
MANIFEST = "manifest.json"
REJECTS = "rejects.jsonl"
# The manifest's setting `video` for tars that other tools wrote (foreign.py).
AS_FOUND = "as found"
# Between the names of the data sets (or splits) of merged shards: kinetics400+ssv2.
JOINED_BY = "+"
# Open files and parsed indices that a reader keeps; a window of the order spans few shards.
_OPEN_SHARDS = 64
_MAX_FRAMES = 2**31 - 1
# Threads, calls between time checks, and seconds before a progress bar appears.
_THREADS, _AT_ONCE, _SHOWN_AFTER_S = 16, 512, 5

# Class names in the order of their numbers: of the only label, or of each label set by its name.
ClassNames = Sequence[str] | Mapping[str, Sequence[str]]
# Keys that only samples with several labels have.
_OF_SETS = ("label_sets", "labels_by_set")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @pydantic.model_serializer(mode="wrap")
    def _as_before(self, dump: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omit unused label sets: JSON bytes, and so hashes, are those of earlier versions."""
        content: dict[str, Any] = dump(self)
        return {k: v for k, v in content.items() if k not in _OF_SETS or v is not None}


class Reject(_Record):
    """A rejected video."""

    source_path: str
    reason: str
    message: str


class IndexedSample(_Record):
    """Offset and size of a video in its shard, and what the loader needs to sample it."""

    key: str
    suffix: str
    offset: int
    bytes: int
    # Of the video; every read compares it.
    crc32: int
    num_frames: int
    label: int | None
    # The label's number in each of the manifest's label sets.
    labels_by_set: dict[str, int] | None = None


class ShardIndex(_Record):
    """The index beside a shard, written last: its presence says that the shard is complete."""

    version: int = VERSION
    # Hash of everything that determines the shard's content; a rerun compares it.
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
    # For samples with several labels, such as verb and noun; `labels` is then one of the sets.
    label_sets: dict[str, tuple[str, ...]] | None = None
    settings: dict[str, str | int | None]
    num_samples: int
    num_rejects: int
    # A tuple when written, a `ShardTable` when read.
    shards: SkipValidation[Sequence[Shard]]

    @property
    def datasets(self) -> tuple[str, ...]:
        """The data sets of the samples: several after a merge."""
        return tuple(self.dataset.split(JOINED_BY))

    @property
    def names_by_set(self) -> dict[str, tuple[str, ...]]:
        """Class names of every label set, with `labels` as the set ''."""
        return {"": self.labels or (), **(self.label_sets or {})}

    def class_names(self, heads: Sequence[str] | None = None) -> ClassNames | None:
        """Names of `labels`, or of the label sets `heads` (`UserError` if unknown)."""
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
    """The class names of every label set; those of an only label are the set ''."""
    sets = names if isinstance(names, Mapping) else {"": names or ()}
    return {name: list(classes) for name, classes in sets.items()}


def require_same_labels(
    first: str, labels: ClassNames | None, second: str, others: ClassNames | None
) -> None:
    """Errors: `UserError` if two class lists, which `first` and `second` name, differ."""
    ours, theirs = by_set(labels), by_set(others)
    for name in {**ours, **theirs}:
        a, b = ours.get(name, []), theirs.get(name, [])
        if a == b:
            continue
        first_set, second_set = (f"{x} ({name})" if name else x for x in (first, second))
        alone = [f"'{label}' only in {first_set}" for label in a if label not in b]
        alone += [f"'{label}' only in {second_set}" for label in b if label not in a]
        what = alone[0] if alone else "in another order"
        raise UserError(
            f"{first_set} and {second_set} have different labels ({len(a)} and {len(b)}; {what}), "
            "so their label numbers do not mean the same. Make both from one set of class names "
            "(arvideo shards --labels)."
        )


class AlteredError(Exception):
    """A video whose bytes in the shard changed after writing."""


class UnreachableError(UserError):
    """A file that a server, a network or a disk does not deliver at the moment."""


class ShardSet:
    """An open folder of shards (or its URL): counts, labels, hash, samples by (shard, place).

    Opens each shard at its first use, in any process. Errors: `UserError` for a missing or invalid
    manifest, or a shard that differs from it; `UnreachableError` if a file is not readable now.
    """

    def __init__(self, folder: str | Path) -> None:
        # As the user wrote it; `self.folder` has the files (for a URL: its cache).
        self.name = str(folder)
        store = open_store(folder)
        try:
            with store.newest(MANIFEST).open("rb") as file:
                # Identifies the data set in checkpoints and results.
                self.hash = sha256_of_file(file)
                file.seek(0)
                self.manifest, table = _parse_manifest(file, self.hash, self.name)
        except FileNotFoundError:
            raise UserError(
                f"there are no shards in {folder} (no {MANIFEST}). {how_to_make_shards(self.name)}"
            ) from None
        except OSError as error:
            raise UserError(f"cannot read {folder}/{MANIFEST}: {error}.") from None
        self.samples_of_shards, self.num_bytes = table.samples, int(table.bytes.sum())
        self._store = store.of(self.hash)
        self.folder = self._store.folder

    @property
    def sets(self) -> tuple[ShardSet, ...]:
        """Itself: a mixture (mix.py) has several."""
        return (self,)

    @property
    def videos(self) -> int:
        """Their number; of a mixture, those of its sources."""
        return self.num_samples

    @property
    def num_samples(self) -> int:
        return self.manifest.num_samples

    @property
    def layers(self) -> int:
        """Every so many frames is one that others refer to (`TranscodeSettings`); 1 is all."""
        return int(self.manifest.settings.get("layers") or 1)

    @property
    def is_remote(self) -> bool:
        """Whether the shards are behind a URL, the same for every machine."""
        return not self._store.permanent

    @functools.lru_cache(maxsize=_OPEN_SHARDS)  # noqa: B019  lives as long as its reader
    def index(self, shard: int) -> ShardIndex:
        """The parsed index of a shard."""
        entry = self.manifest.shards[shard]
        data = self._index_bytes(entry)
        try:
            return _parse_index(data, entry, self.manifest)
        except ValueError as error:
            raise UserError(
                f"{self.name}/{entry.index_name} is not a valid index of {entry.name} "
                f"({_reason(error)}); make the shards again."
            ) from None

    def read(self, shard: int, sample: IndexedSample) -> bytes:
        """The bytes of one video. Errors: `AlteredError` if they changed after writing."""
        data = self.read_bytes(shard, sample.offset, sample.bytes)
        if len(data) != sample.bytes or zlib.crc32(data) != sample.crc32:
            name = self.manifest.shards[shard].name
            raise AlteredError(f"its bytes in {name} changed after writing; copy the shard again")
        return data

    def read_bytes(self, shard: int, offset: int, size: int) -> bytes:
        """Bytes of the tar, unchecked; fewer at its end."""
        file = self._keep_open(shard) if self._store.permanent else self._open(shard)
        try:
            return read_at(file.fileno(), size, offset)
        except OSError as error:
            name = self.manifest.shards[shard].name
            raise UnreachableError(f"cannot read {self.name}/{name}: {error}.") from None

    def path(self, shard: int) -> Path:
        """The tar of a shard on this machine; fetches it from a URL."""
        entry = self.manifest.shards[shard]
        with self._explained(entry):
            return self._store.path(entry.name, entry.bytes)

    def fetch_ahead(self, shard: int) -> None:
        """Fetch a shard behind a URL in the background."""
        if not self._store.permanent:
            entry = self.manifest.shards[shard]
            self._store.fetch_ahead(entry.index_name)
            self._store.fetch_ahead(entry.name, entry.bytes)

    def require_own(self) -> None:
        """Errors: `UserError` for tars of other tools, which lack the facts of their videos."""
        if self.manifest.settings.get("video") == AS_FOUND:
            raise UserError(
                f"{self.name} contains tars that `arvideo index` made readable for training; this "
                "tool needs shards of `arvideo shards`."
            )

    def check_sizes(self) -> None:
        """Compare every shard's size with the manifest."""
        each_in_threads(self._require_size, len(self.manifest.shards), f"sizes in {self.name}")

    def check(self, *, limit_s: float) -> int:
        """Check all sizes, and as many indices as `limit_s` allows; returns their number."""
        self.check_sizes()
        what = f"indices in {self.name}"
        return each_in_threads(self.index, len(self.manifest.shards), what, limit_s=limit_s)

    def _index_bytes(self, entry: Shard) -> bytes:
        for _ in range(2):
            with self._explained(entry, entry.index_name):
                descriptor = self._store.open(entry.index_name)
                with open(descriptor, "rb") as file:  # noqa: PTH123
                    data = file.read()
            if hashlib.sha256(data).hexdigest() == entry.index_sha256:
                return data
            # Perhaps only the cached copy is damaged.
            self._store.discard(entry.index_name)
        where = f"{self.name}/{entry.index_name}"
        raise UserError(f"{where} was altered after the manifest was written; make it again.")

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
            if size is not None and size != entry.bytes:
                raise WrongSizeError(size)

    @contextlib.contextmanager
    def _explained(self, entry: Shard, name: str | None = None) -> Iterator[None]:
        """Turn the store's errors about a shard, or its file `name`, into user errors."""
        try:
            yield
        except FetchError as error:
            raise UnreachableError(f"{error}.") from None
        except WrongSizeError as error:
            raise UserError(
                f"shard {self.name}/{entry.name} has {error.size} bytes, the manifest says "
                f"{entry.bytes}: it was truncated or altered. Copy it again, or delete it and "
                "rerun make_shards."
            ) from None
        except OSError as error:
            raise UserError(
                f"cannot open {self.name}/{name or entry.name}: {error.strerror or error}. Copy it "
                "again, or make the shards again."
            ) from None


def read_rejects(folder: Path) -> list[Reject]:
    """The rejected videos of a folder of shards. Errors: `UserError` for an unreadable list."""
    path = folder / REJECTS
    try:
        return [Reject.model_validate_json(line) for line in path.read_bytes().splitlines()]
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); copy it again.") from None
    except ValidationError:
        raise UserError(f"{path} has lines that are not valid rejects; copy it again.") from None


def _parse_manifest(file: BinaryIO, digest: str, folder: str) -> tuple[Manifest, ShardTable]:
    """A manifest, and its shards as arrays. Errors: `UserError`, `OSError`."""
    try:
        tree, shards = shared_table(file, digest)
        if (version := tree.get("version")) != VERSION:
            raise ValueError(f"it has version {version}, this program reads version {VERSION}")
        manifest = Manifest.model_validate(tree | {"shards": shards})
        total = int(shards.samples.sum(dtype=np.int64))
        if manifest.num_samples != total or manifest.num_rejects < 0:
            raise ValueError(
                f"it counts {manifest.num_samples} samples and {manifest.num_rejects} rejects, but "
                f"its shards have {total} samples"
            )
    except ValueError as error:
        raise UserError(
            f"{folder}/{MANIFEST} is not a manifest that this version reads ({_reason(error)}); "
            "make the shards again, or copy the manifest again."
        ) from None
    return manifest, shards


def _parse_index(data: bytes, entry: Shard, manifest: Manifest) -> ShardIndex:
    """Errors: ValueError if an index contradicts the manifest or points outside its shard."""
    index = ShardIndex.model_validate_json(data)
    samples = index.samples
    if index.version != VERSION:
        raise ValueError(f"it has version {index.version}, this program reads version {VERSION}")
    if (len(samples), index.shard_bytes) != (entry.samples, entry.bytes):
        raise ValueError(
            f"it has {len(samples)} samples in {index.shard_bytes} bytes, the manifest says "
            f"{entry.samples} in {entry.bytes}"
        )
    if len({sample.key for sample in samples}) != len(samples):
        raise ValueError("a key occurs twice")
    counts = {name: len(names) for name, names in manifest.names_by_set.items()}
    for sample in samples:
        if sample.offset < 0 or sample.bytes < 0 or sample.offset + sample.bytes > entry.bytes:
            raise ValueError(f"{sample.key} is outside of the shard")
        if not 0 < sample.num_frames <= _MAX_FRAMES:
            raise ValueError(f"{sample.key} has {sample.num_frames} frames")
        for name, label in {"": sample.label, **(sample.labels_by_set or {})}.items():
            count = counts.get(name, 0)
            if label is not None and not 0 <= label < count:
                of_set = f" of {name}" if name else ""
                message = f"{sample.key} has label {label}{of_set}, the manifest {count} labels"
                raise ValueError(message)
    return index


def _reason(error: ValueError) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return f"{where}: {first['msg']}" if where else first["msg"]
    return " ".join(str(error).split())[:300]


def each_in_threads(
    function: Callable[[int], Any], count: int, what: str, *, limit_s: float = math.inf
) -> int:
    """Call a function that waits for I/O with 0 .. count-1 for `limit_s`; returns their number."""
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
    """A file descriptor that is closed when its last reference goes."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor

    def __del__(self) -> None:
        os.close(self._descriptor)


def dump_json(record: BaseModel) -> bytes:
    """JSON bytes that depend only on the content."""
    return (json.dumps(record.model_dump(), indent=1, ensure_ascii=False) + "\n").encode()
