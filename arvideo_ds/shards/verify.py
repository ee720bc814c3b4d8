"""Shards checked against their manifest: every byte by its hash, a share of the videos by decoding.

Shards and videos are read in processes that can be killed. A problem never ends the check: all of
them are collected, each with the file and, where it is one sample's, the key.
"""

from __future__ import annotations

import hashlib
import io
import re
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from tqdm import tqdm

from arvideo_ds.decoding.processes import Failed, killable_map
from arvideo_ds.decoding.video import RejectedError, probe
from arvideo_ds.errors import UserError
from arvideo_ds.files.checksums import sha256_of
from arvideo_ds.randomness import pick_generator
from arvideo_ds.shards import manifest as m
from arvideo_ds.shards.ingest import MIN_DECODABLE
from arvideo_ds.shards.members import (
    FACTS_SUFFIX,
    DamagedError,
    Member,
    facts_members,
    parse_facts,
    read_member,
    read_members,
)
from arvideo_ds.shards.video_files import read_at

Labels = tuple[str, ...] | None
LabelSets = dict[str, tuple[str, ...]] | None


@dataclass(frozen=True)
class Problem:
    """What is wrong with a file of the folder, or with the sample `key` in it."""

    file: str
    key: str | None
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.file, self.key, self.message) if part)


@dataclass(frozen=True)
class Verification:
    """What was checked and what was wrong. `bytes` of the tars that are there; wall seconds."""

    problems: tuple[Problem, ...]
    num_shards: int
    num_samples: int
    bytes: int
    read_s: float
    num_decoded: int
    decode_s: float


def verify(
    folder: Path, *, decode_share: float, workers: int, seed: int, timeout_s: float
) -> Verification:
    """Check all shards of a folder.

    decode_share: share of each shard's videos to decode, at least one. seed: chooses them.
    timeout_s: per video. Errors: `UserError` when there is no manifest that can be read.
    """
    shards = m.ShardSet(folder)
    shards.require_own()
    problems = list(_folder_problems(shards))
    started = time.monotonic()
    problems += _check_shards(shards, workers)
    read_s = time.monotonic() - started
    problems += _repeated_keys(shards)
    paths = [folder / entry.name for entry in shards.manifest.shards]
    there = [number for number, path in enumerate(paths) if path.is_file()]
    chosen = list(_choose(shards, there, decode_share, seed))
    started = time.monotonic()
    problems += _check_videos(shards, chosen, workers, timeout_s)
    return Verification(
        problems=tuple(problems),
        num_shards=len(shards.manifest.shards),
        num_samples=shards.num_samples,
        bytes=sum(paths[number].stat().st_size for number in there),
        read_s=read_s,
        num_decoded=len(chosen),
        decode_s=time.monotonic() - started,
    )


def _folder_problems(shards: m.ShardSet) -> Iterator[Problem]:
    """The list of rejects, and the files in the folder."""
    manifest, folder = shards.manifest, shards.folder
    names = {entry.name for entry in manifest.shards}
    yield from _reject_problems(folder / m.REJECTS, manifest.num_rejects)
    for path in sorted(folder.glob("*.tar")):
        if path.name not in names and not _holds_nothing(folder, path.name):
            yield Problem(path.name, None, "is in the folder, but the manifest does not name it")


def _reject_problems(path: Path, promised: int) -> Iterator[Problem]:
    try:
        lines = path.read_bytes().splitlines()
        for line in lines:
            m.Reject.model_validate_json(line)
    except OSError as error:
        yield Problem(path.name, None, f"cannot be read ({error.strerror})")
    except ValidationError:
        yield Problem(path.name, None, "has lines that are no rejects")
    else:
        if len(lines) != promised:
            message = f"has {len(lines)} lines, the manifest says {promised} rejects"
            yield Problem(path.name, None, message)


def _holds_nothing(folder: Path, shard_name: str) -> bool:
    """True for a shard all of whose videos were left out: complete, but not in the manifest."""
    try:
        index = m.ShardIndex.model_validate_json((folder / m.index_name(shard_name)).read_bytes())
    except (OSError, ValidationError):
        return False
    return not index.samples


def _check_shards(shards: m.ShardSet, workers: int) -> Iterator[Problem]:
    entries = shards.manifest.shards
    known = shards.manifest.labels, shards.manifest.label_sets
    calls = [(shards.folder, entry, *known) for entry in entries]
    total = sum(entry.bytes for entry in entries)
    with tqdm(total=total, unit="B", unit_scale=True, desc="shards") as bar:
        # No time limit: how long a shard takes is a matter of its size and the disk.
        results = killable_map(check_shard, calls, workers=workers, timeout_s=None)
        for entry, found in zip(entries, results, strict=True):
            if isinstance(found, Failed):  # the other shards are still to be checked
                yield Problem(entry.name, None, f"cannot be checked: {found.message}")
            else:
                yield from found
            bar.update(entry.bytes)


def check_shard(
    folder: Path, entry: m.Shard, labels: Labels, label_sets: LabelSets = None
) -> list[Problem]:
    """All that is wrong with one shard and its index, but for what decoding would show."""
    path = folder / entry.name
    if not path.is_file():
        return [Problem(entry.name, None, "the manifest names it, the folder lacks it")]
    altered = _alteration(path, entry)
    problems = [Problem(entry.name, None, altered)] if altered else []
    try:
        index = _trusted_index(folder, entry)
    except DamagedError as error:
        return [*problems, Problem(entry.index_name, None, error.message)]
    members: list[Member] = []
    try:
        members.extend(read_members(path))
    except DamagedError as error:
        problems.append(Problem(entry.name, None, error.message))
    found = [*_member_problems(members, index)]
    found += _sample_problems(path, members, index, labels, label_sets)
    if altered:
        found += _altered_videos(path, index)
    return problems + [Problem(entry.name, key, message) for key, message in found]


def _alteration(path: Path, entry: m.Shard) -> str:
    """In which way the file is not the manifest's, or empty text."""
    size = path.stat().st_size
    if size != entry.bytes:
        return f"has {size} bytes, the manifest says {entry.bytes}: it was truncated or altered"
    if sha256_of(path) != entry.sha256:
        return "has another SHA-256 than the manifest says: it was altered"
    return ""


def _trusted_index(folder: Path, entry: m.Shard) -> m.ShardIndex:
    """The index, once its hash and what it says of the shard are the manifest's."""
    try:
        data = (folder / entry.index_name).read_bytes()
        if hashlib.sha256(data).hexdigest() != entry.index_sha256:
            raise DamagedError(None, "has another SHA-256 than the manifest says: it was altered")
        index = m.ShardIndex.model_validate_json(data)
    except OSError as error:
        raise DamagedError(None, f"cannot be read ({error.strerror})") from None
    except ValidationError as error:
        raise DamagedError(None, f"is no index ({error.errors()[0]['msg']})") from None
    said = (index.shard_bytes, index.shard_sha256, len(index.samples))
    if said != (entry.bytes, entry.sha256, entry.samples):
        raise DamagedError(None, "says another size, SHA-256 or sample count than the manifest")
    return index


# What follows yields pairs of a key, or None where it is the whole shard, and a message.
_Found = Iterator[tuple[str | None, str]]


def _member_problems(members: list[Member], index: m.ShardIndex) -> _Found:
    """Members that are unsafe to unpack, come twice, or belong to no sample."""
    expected = {f"{s.key}.{suffix}" for s in index.samples for suffix in (s.suffix, FACTS_SUFFIX)}
    for name, count in Counter(member.name for member in members).items():
        if count > 1:
            yield None, f"member {name} is there {count} times"
        if not _is_safe(name):
            yield None, f"member {name} would be unpacked outside of a folder"
        elif name not in expected:
            yield None, f"member {name} is of no sample in the index"
    for member in members:
        if not member.is_file:
            yield None, f"member {member.name} is a link or a device, not a file"


def _sample_problems(
    path: Path,
    members: list[Member],
    index: m.ShardIndex,
    labels: Labels,
    label_sets: LabelSets,
) -> _Found:
    """Samples that do not lie where the index says, or whose facts are of another video."""
    places, facts_places = {member.name: member for member in members}, facts_members(members)
    with path.open("rb") as file:
        for sample in index.samples:
            place = places.get(f"{sample.key}.{sample.suffix}")
            if place is None:
                yield sample.key, "is in the index, but not in the tar"
                continue
            if (place.offset, place.bytes) != (sample.offset, sample.bytes):
                yield (
                    sample.key,
                    f"{place.bytes} bytes at {place.offset} of the tar, but {sample.bytes} bytes "
                    f"at {sample.offset} says the index",
                )
            try:
                facts = parse_facts(read_member(file, facts_places, sample.key), sample)
            except DamagedError as error:
                yield sample.key, error.message
            else:
                yield from _label_problems(sample.key, facts.label, facts.label_name, labels)
                names = facts.names_by_set or {}
                for which, number in (facts.labels_by_set or {}).items():
                    known = (label_sets or {}).get(which)
                    yield from _label_problems(sample.key, number, names.get(which), known)


def _label_problems(key: str, number: int | None, name: str | None, labels: Labels) -> _Found:
    if number is None:
        return
    if not 0 <= number < len(labels or ()):
        yield key, f"has label {number}, the manifest {len(labels or ())} labels"
    elif labels is not None and labels[number] != name:
        yield key, f"is labelled '{name}', number {number} '{labels[number]}'"


def _altered_videos(path: Path, index: m.ShardIndex) -> _Found:
    """Which videos are not those once written; asked where a shard's hash is wrong."""
    with path.open("rb") as file:
        for sample in index.samples:
            video = read_at(file.fileno(), sample.bytes, sample.offset)
            if zlib.crc32(video) != sample.crc32:
                yield sample.key, "its video is not the one once written (another CRC-32)"


def _repeated_keys(shards: m.ShardSet) -> Iterator[Problem]:
    first: dict[str, str] = {}
    for number, entry in enumerate(shards.manifest.shards):
        for sample in _samples(shards, number):
            if sample.key in first:
                yield Problem(entry.name, sample.key, f"is in {first[sample.key]} as well")
            first.setdefault(sample.key, entry.name)


def _choose(
    shards: m.ShardSet, numbers: list[int], share: float, seed: int
) -> Iterator[tuple[int, m.IndexedSample]]:
    """Pairs of a shard's number and a sample, in the order of the shards."""
    for number in numbers:
        samples = _samples(shards, number)
        count = min(len(samples), max(1, round(share * len(samples))))
        order = pick_generator(seed, number).permutation(len(samples))
        for place in sorted(order[:count]):
            yield number, samples[place]


def _samples(shards: m.ShardSet, number: int) -> tuple[m.IndexedSample, ...]:
    """The samples of a shard, none where its index is damaged, which was named before."""
    try:
        return shards.index(number).samples
    except (UserError, ValidationError):
        return ()


def _check_videos(
    shards: m.ShardSet,
    chosen: list[tuple[int, m.IndexedSample]],
    workers: int,
    timeout_s: float,
) -> Iterator[Problem]:
    names = [shards.manifest.shards[number].name for number, _ in chosen]
    calls = [
        (shards.folder / name, sample) for name, (_, sample) in zip(names, chosen, strict=True)
    ]
    results = killable_map(count_decodable, calls, workers=workers, timeout_s=timeout_s)
    bar = tqdm(results, total=len(chosen), unit="video", desc="decoding")
    for name, (_, sample), decodable in zip(names, chosen, bar, strict=True):
        if isinstance(decodable, Failed):
            message = f"does not decode: {decodable.reason}: {decodable.message}"
            yield Problem(name, sample.key, message)
            continue
        # The index counts what all decoders of the machine that wrote it could read.
        if not MIN_DECODABLE * decodable <= sample.num_frames <= decodable:
            message = f"{decodable} frames decode, the index says {sample.num_frames}"
            yield Problem(name, sample.key, message)


def count_decodable(path: Path, sample: m.IndexedSample) -> int:
    """How many frames of a video decode. Errors: `RejectedError`, also where training would not
    take it for the video once written."""
    with path.open("rb") as file:
        video = read_at(file.fileno(), sample.bytes, sample.offset)
    if zlib.crc32(video) != sample.crc32:
        raise RejectedError("altered", "it has another CRC-32 than the index says")
    return probe(io.BytesIO(video)).num_frames


def _is_safe(name: str) -> bool:
    """Unpacking it writes below the folder it is unpacked in, on any system."""
    parts = re.split(r"[/\\]", name)
    return ".." not in parts and parts[0] != "" and not re.match("[A-Za-z]:", name)
