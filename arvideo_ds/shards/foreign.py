"""WebDataset tars of other projects, indexed in place: nothing is copied or rewritten.

The index beside each tar gives them the exact order, resume and reject counts of our own shards.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from arvideo_ds.decoding.decoders import decisive_decoders, load_decoders
from arvideo_ds.decoding.processes import Failed, killable_map
from arvideo_ds.errors import UserError
from arvideo_ds.files.atomic import write_bytes
from arvideo_ds.files.locks import lock
from arvideo_ds.shards import manifest as m
from arvideo_ds.shards.datasets.listing import class_names
from arvideo_ds.shards.ingest import ingest_bytes
from arvideo_ds.shards.members import DamagedError, Member, read_members
from arvideo_ds.shards.video_files import read_at
from arvideo_ds.shards.writer import (
    ShardReport,
    complete_index,
    rejected,
    write_index,
    write_report,
)

_SETTINGS: dict[str, str | int | None] = {"video": m.AS_FOUND}
_SUFFIXES = ("mp4", "webm", "avi", "mkv", "mov")


@dataclass(frozen=True)
class ForeignSample:
    """A video in a tar, and its label: a number or a name, from `cls` or `label` of the json."""

    key: str
    suffix: str
    member: Member
    label: int | str | None


def index_shards(
    folder: Path, *, dataset: str, workers: int, timeout_s: float, labels: Path | None = None
) -> ShardReport:
    """Write an index beside every tar of a folder that has none, then manifest and rejects.

    labels: a file of class names; without it names are numbered in sorted order. Errors:
    `UserError` where a tar is damaged or no video is usable.
    """
    tars = sorted(folder.glob("*.tar")) if folder.is_dir() else []
    if not tars:
        raise UserError(f"{folder} is not a folder with .tar files.")
    if (folder / m.MANIFEST).exists() and m.ShardSet(folder).manifest.settings != _SETTINGS:
        raise UserError(f"{folder} has shards of `arvideo shards`; they need no other index.")
    with lock(folder):
        listed = {path: samples_of(path) for path in tqdm(tars, unit="tar", desc="listing")}
        names = _names(labels, {sample.label for samples in listed.values() for sample in samples})
        numbers = {name: number for number, name in enumerate(names or ())}
        complete = {path: _complete_index(path) for path in tars}
        indices = {}
        for path, samples in listed.items():
            index = complete[path] or _index(path, samples, workers, timeout_s)
            indices[path.name] = _with_labels(path, index, samples, numbers)
        return write_report(
            folder,
            indices,
            (),
            sum(index is not None for index in complete.values()),
            dataset=dataset,
            split=None,
            labels=names,
            settings=_SETTINGS,
        )


def _names(path: Path | None, labels: Iterable[int | str | None]) -> tuple[str, ...] | None:
    """Class names in the order of their numbers; the numbers themselves without names.

    Errors: `UserError` where names and numbers are mixed, or the file lacks a label.
    """
    words = {label for label in labels if isinstance(label, str)}
    numbers = {label for label in labels if isinstance(label, int)}
    if words and numbers:
        raise UserError(
            f"some labels are names ('{min(words)}'), others numbers ({min(numbers)}), which "
            "cannot be matched. Write one kind into the tars."
        )
    if path is None:
        return tuple(sorted(words) or map(str, range(max(numbers, default=-1) + 1))) or None
    if not (words or numbers):
        raise UserError(f"--labels {path} is given, but the videos have no labels.")
    names = class_names(path, words)
    if numbers and max(numbers) >= len(names):
        raise UserError(f"{path} has {len(names)} labels, but the tars use number {max(numbers)}.")
    return names


def _complete_index(path: Path) -> m.ShardIndex | None:
    """The index beside a tar, or None. Errors: `UserError` for the index of another tar."""
    try:
        return complete_index(path.parent, path.name, _inputs(path))
    except UserError:
        name = m.index_name(path.name)
        raise UserError(
            f"{path.parent / name} was written for another {path.name}, or by `arvideo shards`. "
            "Remove that index (not the tar), and the same command writes a new one."
        ) from None


def _with_labels(
    path: Path, index: m.ShardIndex, samples: Sequence[ForeignSample], numbers: Mapping[str, int]
) -> m.ShardIndex:
    """The index with labels as numbers; written where the labels change it."""
    labels = {s.key: numbers[s.label] if isinstance(s.label, str) else s.label for s in samples}
    labelled = tuple(s.model_copy(update={"label": labels[s.key]}) for s in index.samples)
    changed = index.model_copy(update={"samples": labelled})
    if changed != index:
        write_bytes(path.with_name(m.index_name(path.name)), m.dump_json(changed))
    return changed


def samples_of(path: Path) -> list[ForeignSample]:
    """The videos of a tar, in its order. Errors: `UserError` where it is damaged."""
    try:
        files = [member for member in read_members(path) if member.is_file]
    except DamagedError as error:
        raise UserError(f"{path} {error.message}; copy it again.") from None
    by_key: dict[str, dict[str, Member]] = {}
    for member in files:
        folder, _, name = member.name.rpartition("/")
        # WebDataset: the key ends before the first dot of the file name.
        stem, _, suffix = name.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        by_key.setdefault(key, {})[suffix.lower()] = member
    with path.open("rb") as file:
        return [
            ForeignSample(key, suffix, members[suffix], _label(path, key, file.fileno(), members))
            for key, members in by_key.items()
            for suffix in _SUFFIXES
            if suffix in members
        ]


def _label(path: Path, key: str, descriptor: int, members: dict[str, Member]) -> int | str | None:
    def content(suffix: str) -> bytes:
        return read_at(descriptor, members[suffix].bytes, members[suffix].offset)

    try:
        if "cls" in members:
            label: object = content("cls").decode().strip()
            with contextlib.suppress(ValueError):
                label = json.loads(str(label))
            return _checked(label)
        if "json" in members:
            facts = json.loads(content("json"))
            return _checked(facts.get("label")) if isinstance(facts, dict) else None
    except ValueError as error:
        raise UserError(f"{path}, {key}: its label cannot be read ({error}).") from None
    return None


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
    path: Path, samples: Sequence[ForeignSample], workers: int, timeout_s: float
) -> m.ShardIndex:
    """Write the index of a tar, without labels."""
    decoders = decisive_decoders()
    results = killable_map(
        _inspect,
        ((path, sample.member, sample.suffix, decoders) for sample in samples),
        workers=workers,
        timeout_s=timeout_s,
        prepare=partial(load_decoders, decoders),
    )
    indexed, rejects = [], []
    bar = tqdm(samples, unit="video", desc=path.name)
    for sample, result in zip(bar, results, strict=True):
        if isinstance(result, Failed):
            rejects.append(rejected(f"{path.name}/{sample.key}", result))
            continue
        num_frames, crc32 = result
        indexed.append(
            m.IndexedSample(
                key=sample.key,
                suffix=sample.suffix,
                offset=sample.member.offset,
                bytes=sample.member.bytes,
                crc32=crc32,
                num_frames=num_frames,
                label=None,
            )
        )
    return write_index(path, _inputs(path), indexed, rejects)


def _inspect(path: Path, member: Member, suffix: str, decoders: Sequence[str]) -> tuple[int, int]:
    """Number of frames and CRC-32 of a video."""
    with path.open("rb") as file:
        data = read_at(file.fileno(), member.bytes, member.offset)
    return ingest_bytes(data, suffix, decoders).facts["num_frames"], zlib.crc32(data)
