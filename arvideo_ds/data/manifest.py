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
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from arvideo_ds.errors import UserError

VERSION = 1
MANIFEST = "manifest.json"
REJECTS = "rejects.jsonl"
# Open files and parsed indices that one reader keeps; a window of the order spans few shards.
_OPEN_SHARDS = 64


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


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
    num_frames: int
    label: int | None


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
    name: str
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
    settings: dict[str, str | int | None]
    num_samples: int
    num_rejects: int
    shards: tuple[Shard, ...]


class ShardSet:
    """A folder of shards, opened: counts, labels, hash, and samples by (shard, place).

    Shards are opened on first use, in whatever process uses them. Errors: `UserError` when the
    manifest is missing or unreadable, or a shard is not the one that the manifest describes.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        text = _read_manifest(self.folder)
        try:
            self.manifest = Manifest.model_validate_json(text)
        except ValidationError as error:
            raise UserError(
                f"{self.folder / MANIFEST} is no manifest that this version reads "
                f"({error.errors()[0]['msg']}); make the shards again."
            ) from None
        if self.manifest.version != VERSION:
            raise UserError(
                f"{self.folder / MANIFEST} has version {self.manifest.version}, this program "
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
        path = self.folder / self.manifest.shards[shard].index_name
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {path}: {error}; make the shards again.") from None
        if hashlib.sha256(data).hexdigest() != self.manifest.shards[shard].index_sha256:
            raise UserError(f"{path} was altered after the manifest was written; make it again.")
        return ShardIndex.model_validate_json(data)

    def read(self, shard: int, sample: IndexedSample) -> bytes:
        """The bytes of one video."""
        data = os.pread(self._open(shard).fileno(), sample.bytes, sample.offset)
        if len(data) != sample.bytes:
            raise UserError(f"{self.manifest.shards[shard].name} ends before {sample.key} does.")
        return data

    def check_sizes(self) -> None:
        """Compare every shard's size with the manifest, before any work begins."""
        for number in range(len(self.manifest.shards)):
            self._require_size(number)

    @functools.lru_cache(maxsize=_OPEN_SHARDS)  # noqa: B019
    def _open(self, shard: int) -> _File:
        return _File(self._require_size(shard))

    def _require_size(self, shard: int) -> Path:
        entry = self.manifest.shards[shard]
        path = self.folder / entry.name
        try:
            size = path.stat().st_size
        except OSError as error:
            raise UserError(f"cannot open shard {path}: {error}.") from None
        if size != entry.bytes:
            raise UserError(
                f"shard {path} has {size} bytes, the manifest says {entry.bytes}: it was truncated "
                "or altered. Copy it again, or delete it and rerun make_shards."
            )
        return path


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


def _read_manifest(folder: Path) -> bytes:
    try:
        return (folder / MANIFEST).read_bytes()
    except OSError:
        raise UserError(
            f"there are no shards in {folder} (no {MANIFEST}). Make them with: "
            f"python data_tools/make_shards.py --dataset folder --videos VIDEOS --output {folder}"
        ) from None
