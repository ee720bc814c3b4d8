"""Somebody else's WebDataset tars, indexed where they lie: nothing is copied or rewritten.

Streaming them would lose the order, the exact resume and the counts of what is left out. Reading
them once, to write an index beside each, gives all of that.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from arvideo_ds.data import manifest as m
from arvideo_ds.data.decoders import available_decoders
from arvideo_ds.data.ingest import ingest_bytes
from arvideo_ds.data.members import DamagedError, Member, read_members
from arvideo_ds.data.processes import failure, killable_map
from arvideo_ds.data.shard_writer import complete_index, write_atomically, write_manifest
from arvideo_ds.errors import UserError

_SETTINGS: dict[str, str | int | None] = {"video": m.AS_FOUND}
VIDEO_SUFFIXES = ("mp4", "webm", "avi", "mkv", "mov")


@dataclass(frozen=True)
class ForeignSample:
    """A video and its label in a tar: from `cls` (a number), or from `label` of the json."""

    key: str
    suffix: str
    member: Member
    label: int | None


class _Inspected(NamedTuple):
    num_frames: int
    crc32: int


def index_shards(folder: Path, *, dataset: str, workers: int, timeout_s: float) -> m.Manifest:
    """Write an index beside every tar of a folder, then manifest and rejects.

    Goes on after tars that are indexed. Errors: `UserError` where a tar is damaged, holds no video,
    or no video of all is usable.
    """
    tars = sorted(folder.glob("*.tar")) if folder.is_dir() else []
    if not tars:
        raise UserError(f"{folder} is no folder with .tar files.")
    if (folder / m.MANIFEST).exists() and m.ShardSet(folder).manifest.settings != _SETTINGS:
        raise UserError(f"{folder} holds shards of make_shards.py; they need no other index.")
    indices = {}
    for path in tars:
        inputs = _inputs(path)
        index = complete_index(folder, path.name, inputs)
        indices[path.name] = index or _index(path, inputs, workers, timeout_s)
    samples = [sample for index in indices.values() for sample in index.samples]
    rejects = [reject for index in indices.values() for reject in index.rejects]
    if not samples:
        raise UserError(f"none of the {len(rejects)} videos in {folder} is usable.")
    labelled = [sample.label for sample in samples if sample.label is not None]
    return write_manifest(
        folder,
        indices,
        rejects,
        dataset=dataset,
        split=None,
        # Their names are not known here; their numbers are.
        labels=tuple(str(n) for n in range(max(labelled) + 1)) if labelled else None,
        settings=_SETTINGS,
    )


def samples_of(path: Path) -> list[ForeignSample]:
    """The videos of a tar, in its order. Errors: `UserError` where it is damaged."""
    try:
        members = [member for member in read_members(path) if member.is_file]
    except DamagedError as error:
        raise UserError(f"{path} {error.message}; copy it again.") from None
    parts: dict[str, dict[str, Member]] = {}
    for member in members:
        folder, _, name = member.name.rpartition("/")
        # WebDataset: a key is everything before the first dot of the last name.
        stem, _, suffix = name.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        parts.setdefault(key, {})[suffix.lower()] = member
    with path.open("rb") as file:
        return [
            ForeignSample(key, suffix, found[suffix], _label(path, key, file.fileno(), found))
            for key, found in parts.items()
            for suffix in VIDEO_SUFFIXES
            if suffix in found
        ]


def _label(path: Path, key: str, descriptor: int, found: dict[str, Member]) -> int | None:
    def content(suffix: str) -> bytes:
        return os.pread(descriptor, found[suffix].bytes, found[suffix].offset)

    try:
        if "cls" in found:
            return _number(json.loads(content("cls")))
        if "json" in found:
            facts = json.loads(content("json"))
            return _number(facts.get("label")) if isinstance(facts, dict) else None
    except ValueError as error:
        raise UserError(f"{path}, {key}: its label cannot be read ({error}).") from None
    return None


def _number(label: object) -> int | None:
    if label is None:
        return None
    if not isinstance(label, int) or isinstance(label, bool) or label < 0:
        raise ValueError(f"{label!r} is no class number")
    return label


def _inputs(path: Path) -> str:
    return hashlib.sha256(f"{m.VERSION} {path.name} {path.stat().st_size}".encode()).hexdigest()


def _index(path: Path, inputs: str, workers: int, timeout_s: float) -> m.ShardIndex:
    found = samples_of(path)
    results = list(_inspect_all(path, found, workers, timeout_s))
    index = m.ShardIndex(
        inputs=inputs,
        shard_bytes=path.stat().st_size,
        shard_sha256=m.sha256_of(path),
        samples=tuple(result for result in results if isinstance(result, m.IndexedSample)),
        rejects=tuple(result for result in results if isinstance(result, m.Reject)),
    )
    write_atomically(path.with_name(m.index_name(path.name)), m.dump_json(index))
    return index


def _inspect_all(
    path: Path, samples: Sequence[ForeignSample], workers: int, timeout_s: float
) -> Iterator[m.IndexedSample | m.Reject]:
    calls = ((path, s.member.offset, s.member.bytes, s.suffix) for s in samples)
    futures = killable_map(
        _inspect, calls, workers=workers, timeout_s=timeout_s, prepare=available_decoders
    )
    bar = tqdm(samples, unit="video", desc=path.name)
    for sample, future in zip(bar, futures, strict=True):
        try:
            done: _Inspected = future.result()
        except Exception as error:  # a decoder's own bug must not stop the other videos
            reason, message = failure(error, timeout_s)
            yield m.Reject(source_path=f"{path.name}/{sample.key}", reason=reason, message=message)
            continue
        yield m.IndexedSample(
            key=sample.key,
            suffix=sample.suffix,
            offset=sample.member.offset,
            bytes=sample.member.bytes,
            crc32=done.crc32,
            num_frames=done.num_frames,
            label=sample.label,
        )


def _inspect(path: Path, offset: int, size: int, suffix: str) -> _Inspected:
    with path.open("rb") as file:
        data = os.pread(file.fileno(), size, offset)
    return _Inspected(ingest_bytes(data, suffix).facts["num_frames"], zlib.crc32(data))
