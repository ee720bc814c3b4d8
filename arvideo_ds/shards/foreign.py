"""Somebody else's WebDataset tars, indexed where they lie: nothing is copied or rewritten.

Streaming them would lose the order, the exact resume and the counts of what is left out. Reading
them once, to write an index beside each, gives all of that.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from arvideo_ds.decoding.decoders import decisive_decoders, load_decoders
from arvideo_ds.decoding.processes import Failed, killable_map
from arvideo_ds.errors import UserError
from arvideo_ds.files.atomic import write_bytes
from arvideo_ds.files.checksums import sha256_of
from arvideo_ds.files.locks import lock
from arvideo_ds.shards import manifest as m
from arvideo_ds.shards.datasets.listing import class_names
from arvideo_ds.shards.ingest import ingest_bytes
from arvideo_ds.shards.members import DamagedError, Member, read_members
from arvideo_ds.shards.video_files import read_at
from arvideo_ds.shards.writer import (
    ShardReport,
    by_reason,
    complete_index,
    write_manifest,
)

_SETTINGS: dict[str, str | int | None] = {"video": m.AS_FOUND}
VIDEO_SUFFIXES = ("mp4", "webm", "avi", "mkv", "mov")


@dataclass(frozen=True)
class ForeignSample:
    """A video and its label, a number or a name, in a tar: from `cls`, or `label` of the json."""

    key: str
    suffix: str
    member: Member
    label: int | str | None


class _Inspected(NamedTuple):
    num_frames: int
    crc32: int


def index_shards(
    folder: Path,
    *,
    dataset: str,
    workers: int,
    timeout_s: float,
    labels: Path | None = None,
) -> ShardReport:
    """Write an index beside every tar of a folder, then manifest and rejects.

    labels: a file of class names; without it names are numbered in sorted order. Goes on after tars
    that are indexed. Errors: `UserError` where a tar is damaged, holds no video, or no video of all
    is usable.
    """
    tars = sorted(folder.glob("*.tar")) if folder.is_dir() else []
    if not tars:
        raise UserError(f"{folder} is no folder with .tar files.")
    if (folder / m.MANIFEST).exists() and m.ShardSet(folder).manifest.settings != _SETTINGS:
        raise UserError(f"{folder} holds shards of `arvideo shards`; they need no other index.")
    with lock(folder):
        return _index_tars(folder, tars, dataset, workers, timeout_s, labels)


def _index_tars(
    folder: Path,
    tars: Sequence[Path],
    dataset: str,
    workers: int,
    timeout_s: float,
    labels: Path | None,
) -> ShardReport:
    found = {path: samples_of(path) for path in tqdm(tars, unit="tar", desc="listing")}
    names = _names(labels, (sample.label for samples in found.values() for sample in samples))
    numbers = {name: number for number, name in enumerate(names or ())}
    known = {path: _known_index(path) for path in tars}
    indices = {
        path.name: _numbered(path, index, samples, numbers)
        for path, samples in found.items()
        for index in [known[path] or _index(path, samples, workers, timeout_s)]
    }
    rejects = [reject for index in indices.values() for reject in index.rejects]
    reasons = Counter(reject.reason for reject in rejects)
    manifest = write_manifest(
        folder, indices, rejects, dataset=dataset, split=None, labels=names, settings=_SETTINGS
    )
    if not manifest.num_samples:
        raise UserError(
            f"none of the {len(rejects)} videos in {folder} is usable ({by_reason(reasons)}); the "
            f"reasons are in {folder / m.REJECTS}."
        )
    kept = sum(index is not None for index in known.values())
    return ShardReport(manifest, dict(reasons.most_common()), kept)


def _names(path: Path | None, labels: Iterable[int | str | None]) -> tuple[str, ...] | None:
    """Names of the classes in the order of their numbers; those without a name are numbers.

    Errors: `UserError` where some labels are numbers and others names, or the file lacks one.
    """
    used = set(labels) - {None}
    words = {label for label in used if isinstance(label, str)}
    numbers = {label for label in used if isinstance(label, int)}
    if words and numbers:
        raise UserError(
            f"some labels are names ('{min(words)}'), others numbers ({min(numbers)}): it is not "
            "clear which are the same. Write one kind into the tars."
        )
    if path is None:
        return tuple(sorted(words) or map(str, range(max(numbers, default=-1) + 1))) or None
    if not used:
        raise UserError(f"--labels {path} is given, but the videos have no labels.")
    names = class_names(path, words)
    if numbers and max(numbers) >= len(names):
        raise UserError(f"{path} has {len(names)} labels, but the tars use number {max(numbers)}.")
    return names


def _known_index(path: Path) -> m.ShardIndex | None:
    """The index beside a tar, where one is. Errors: `UserError` where it is of another tar."""
    try:
        return complete_index(path.parent, path.name, _inputs(path))
    except UserError:
        name = m.index_name(path.name)
        raise UserError(
            f"{path.parent / name} was written for another {path.name}, or by `arvideo shards`. "
            "Remove that index (not the tar), and the same command writes a new one."
        ) from None


def _numbered(
    path: Path, index: m.ShardIndex, found: Sequence[ForeignSample], numbers: Mapping[str, int]
) -> m.ShardIndex:
    """The index with the labels as numbers; written where that changes it."""
    labels = {s.key: numbers[s.label] if isinstance(s.label, str) else s.label for s in found}
    samples = tuple(s.model_copy(update={"label": labels[s.key]}) for s in index.samples)
    numbered = index.model_copy(update={"samples": samples})
    if numbered != index:
        write_bytes(path.with_name(m.index_name(path.name)), m.dump_json(numbered))
    return numbered


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


def _label(path: Path, key: str, descriptor: int, found: dict[str, Member]) -> int | str | None:
    def content(suffix: str) -> bytes:
        return read_at(descriptor, found[suffix].bytes, found[suffix].offset)

    try:
        if "cls" in found:
            return _checked(_parsed(content("cls").decode().strip()))
        if "json" in found:
            facts = json.loads(content("json"))
            return _checked(facts.get("label")) if isinstance(facts, dict) else None
    except ValueError as error:
        raise UserError(f"{path}, {key}: its label cannot be read ({error}).") from None
    return None


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _checked(label: object) -> int | str | None:
    if isinstance(label, str) and label.isascii() and label.isdecimal():
        return int(label)
    is_number = isinstance(label, int) and not isinstance(label, bool) and label >= 0
    if label is None or is_number or (isinstance(label, str) and label):
        return label  # type: ignore[return-value]
    raise ValueError(f"{label!r} is neither a class number nor a name")


def _inputs(path: Path) -> str:
    return hashlib.sha256(f"{m.VERSION} {path.name} {path.stat().st_size}".encode()).hexdigest()


def _index(
    path: Path, found: Sequence[ForeignSample], workers: int, timeout_s: float
) -> m.ShardIndex:
    """The index of a tar, yet without labels."""
    results = list(_inspect_all(path, found, workers, timeout_s))
    index = m.ShardIndex(
        inputs=_inputs(path),
        shard_bytes=path.stat().st_size,
        shard_sha256=sha256_of(path),
        samples=tuple(result for result in results if isinstance(result, m.IndexedSample)),
        rejects=tuple(result for result in results if isinstance(result, m.Reject)),
    )
    write_bytes(path.with_name(m.index_name(path.name)), m.dump_json(index))
    return index


def _inspect_all(
    path: Path, samples: Sequence[ForeignSample], workers: int, timeout_s: float
) -> Iterator[m.IndexedSample | m.Reject]:
    decoders = decisive_decoders()
    calls = ((path, s.member.offset, s.member.bytes, s.suffix, decoders) for s in samples)
    inspected = killable_map(
        _inspect,
        calls,
        workers=workers,
        timeout_s=timeout_s,
        prepare=partial(load_decoders, decoders),
    )
    bar = tqdm(samples, unit="video", desc=path.name)
    for sample, done in zip(bar, inspected, strict=True):
        if isinstance(done, Failed):
            source_path = f"{path.name}/{sample.key}"
            yield m.Reject(source_path=source_path, reason=done.reason, message=done.message)
            continue
        yield m.IndexedSample(
            key=sample.key,
            suffix=sample.suffix,
            offset=sample.member.offset,
            bytes=sample.member.bytes,
            crc32=done.crc32,
            num_frames=done.num_frames,
            label=None,
        )


def _inspect(
    path: Path, offset: int, size: int, suffix: str, decoders: Sequence[str]
) -> _Inspected:
    with path.open("rb") as file:
        data = read_at(file.fileno(), size, offset)
    return _Inspected(ingest_bytes(data, suffix, decoders).facts["num_frames"], zlib.crc32(data))
