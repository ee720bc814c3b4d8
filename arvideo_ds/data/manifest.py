"""Shards on disk: the manifest, the index beside each shard, and reading a sample by its offset.

<folder>/
  manifest.json                     data set, settings, and name, size and hash of every shard
  <dataset>-<split>-000000.tar      plain WebDataset: <key>.mp4 + <key>.json
  <dataset>-<split>-000000.index.json   where each video of that shard lies
  rejects.jsonl                     every video left out, with the reason
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from arvideo_ds.data.files import how_to_make_shards
from arvideo_ds.data.store import Store, open_store
from arvideo_ds.errors import UserError

VERSION = 2
MANIFEST = "manifest.json"
REJECTS = "rejects.jsonl"
# What the manifest of somebody else's tars says of their videos (foreign.py).
AS_FOUND = "as found"
# Between the names of the data sets (or splits) of merged shards: kinetics400+ssv2.
JOINED_BY = "+"
# Open files and parsed indices that one reader keeps; a window of the order spans few shards.
_OPEN_SHARDS = 64


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
    """Where one video lies in its shard, and what the loader must know to sample it."""

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


class Shard(_Record):
    # A file directly in the folder: nothing outside of it is ever opened.
    name: str = Field(pattern=r"^[^/\\]+\.tar$")
    samples: int
    bytes: int
    sha256: str
    index_sha256: str

    @property
    def index_name(self) -> str:
        return index_name(self.name)


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
    shards: tuple[Shard, ...]

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
                    f"{self.dataset} have {known}. Make them again with make_shards.py (--dataset "
                    "epic_kitchens gives verb and noun; earlier versions gave the verb alone), or "
                    "correct the key."
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
        "(make_shards.py --labels)."
    )


class AlteredError(Exception):
    """A video whose bytes in the shard changed after they were written."""


class ShardSet:
    """A folder of shards (or its URL), opened: counts, labels, hash, samples by (shard, place).

    Shards are opened on first use, in whatever process uses them. Errors: `UserError` when the
    manifest is missing or unreadable, or a shard is not the one that the manifest describes.
    """

    def __init__(self, folder: str | Path) -> None:
        # As the user said it, and where the files are (behind a URL: its cache).
        self.name = str(folder)
        self._store = open_store(folder)
        self.folder = self._store.folder
        text = _read_manifest(self.name, self._store)
        try:
            self.manifest = Manifest.model_validate_json(text)
        except ValidationError as error:
            raise UserError(
                f"{self.name}/{MANIFEST} is no manifest that this version reads "
                f"({error.errors()[0]['msg']}); make the shards again."
            ) from None
        if self.manifest.version != VERSION:
            raise UserError(
                f"{self.name}/{MANIFEST} has version {self.manifest.version}, this program "
                f"reads version {VERSION}; make the shards again."
            )
        # Identifies the data set in checkpoints and results.
        self.hash = hashlib.sha256(text).hexdigest()

    @property
    def num_samples(self) -> int:
        return self.manifest.num_samples

    @functools.lru_cache(maxsize=_OPEN_SHARDS)  # noqa: B019  lives as long as its reader
    def index(self, shard: int) -> ShardIndex:
        """The parsed sidecar of a shard."""
        name = self.manifest.shards[shard].index_name
        try:
            data = self._store.path(name).read_bytes()
        except OSError as error:
            raise UserError(
                f"cannot read {self.name}/{name}: {error}; make the shards again."
            ) from None
        if hashlib.sha256(data).hexdigest() != self.manifest.shards[shard].index_sha256:
            raise UserError(
                f"{self.name}/{name} was altered after the manifest was written; make it again."
            )
        return ShardIndex.model_validate_json(data)

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
        return os.pread(self._open(shard).fileno(), size, offset)

    def path(self, shard: int) -> Path:
        """The tar of a shard on this machine, fetched if it lies behind a URL."""
        self._require_size(shard)
        name = self.manifest.shards[shard].name
        try:
            return self._store.path(name)
        except OSError as error:
            raise UserError(f"cannot open shard {self.name}/{name}: {error}.") from None

    def require_own(self) -> None:
        """Errors: `UserError` for tars of others, which have no facts for tools to work with."""
        if self.manifest.settings.get("video") == AS_FOUND:
            raise UserError(
                f"{self.name} holds tars that index_shards.py made readable for training; this "
                "tool needs shards of make_shards.py."
            )

    def check_sizes(self) -> None:
        """Compare every shard's size with the manifest, before any work begins."""
        for number in range(len(self.manifest.shards)):
            self._require_size(number)

    @functools.lru_cache(maxsize=_OPEN_SHARDS)  # noqa: B019
    def _open(self, shard: int) -> _File:
        return _File(self.path(shard))

    def _require_size(self, shard: int) -> None:
        entry = self.manifest.shards[shard]
        try:
            size = self._store.size(entry.name)
        except OSError as error:
            raise UserError(f"cannot open shard {self.name}/{entry.name}: {error}.") from None
        if size != entry.bytes:
            raise UserError(
                f"shard {self.name}/{entry.name} has {size} bytes, the manifest says "
                f"{entry.bytes}: it was truncated or altered. Copy it again, or delete it and "
                "rerun make_shards."
            )


class _File:
    """A read-only file descriptor that closes with its owner (the cache)."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)

    def fileno(self) -> int:
        return self._descriptor

    def __del__(self) -> None:
        os.close(self._descriptor)


def index_name(shard_name: str) -> str:
    return shard_name.removesuffix(".tar") + ".index.json"


def dump_json(record: BaseModel) -> bytes:
    """JSON bytes that depend on the content alone."""
    return (json.dumps(record.model_dump(), indent=1, ensure_ascii=False) + "\n").encode()


def _read_manifest(folder: str, store: Store) -> bytes:
    try:
        return store.path(MANIFEST, fresh=True).read_bytes()
    except OSError:
        raise UserError(
            f"there are no shards in {folder} (no {MANIFEST}). {how_to_make_shards(folder)}"
        ) from None
