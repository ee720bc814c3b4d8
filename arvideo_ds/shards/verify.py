"""Check shards against their manifest: every byte by its hash, a share of the videos by decoding.

Processes that can be killed read shards and videos; from a URL they fetch each file anew. The check
collects all problems, each with the file and, if one sample has it, the key.
"""

from __future__ import annotations

import hashlib
import io
import re
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from pydantic import ValidationError
from tqdm import tqdm

from arvideo_ds.decoding.processes import Failed, killable_map
from arvideo_ds.decoding.video import RejectedError, probe
from arvideo_ds.errors import UserError
from arvideo_ds.files.checksums import sha256_of
from arvideo_ds.randomness import pick_generator
from arvideo_ds.shards import manifest as m
from arvideo_ds.shards import members as tar
from arvideo_ds.shards.ingest import MIN_DECODABLE
from arvideo_ds.shards.members import DamagedError, Member
from arvideo_ds.shards.store import Store, open_store
from arvideo_ds.shards.video_files import read_at

# Class names of every label set; the only label is the set ''.
NamesBySet = dict[str, tuple[str, ...]]
_THREADS = 16
# A key, or None for the whole shard, and a message.
Finding = tuple[str | None, str]
# An absolute path, or one with "..", of any system.
_is_unsafe = re.compile(r"\Z|[/\\]|[A-Za-z]:|(.*[/\\])?\.\.([/\\]|\Z)", re.DOTALL).match


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
    """The problems, and what was checked: `bytes` of the tars, wall seconds."""

    problems: tuple[Problem, ...]
    num_shards: int
    num_samples: int
    bytes: int
    read_s: float
    num_decoded: int
    decode_s: float


def verify(
    folder: str | Path, *, decode_share: float, workers: int, seed: int, timeout_s: float
) -> Verification:
    """Check all shards of a folder or URL.

    decode_share: share of each shard's videos to decode, at least one. seed: chooses them.
    timeout_s: per video. Errors: `UserError` without a readable manifest.
    """
    shards = m.ShardSet(folder)
    shards.require_own()
    files = open_store(folder).of(shards.hash)
    problems = list(_folder_problems(shards, files))
    started = time.monotonic()
    problems += _check_shards(shards, files, workers)
    read_s = time.monotonic() - started
    problems += _repeated_keys(shards)
    with ThreadPoolExecutor(_THREADS) as pool:
        sizes = list(pool.map(partial(_size, files), shards.manifest.shards))
    numbers = [number for number, size in enumerate(sizes) if size is not None]
    chosen = [pair for number in numbers for pair in _choose(shards, number, decode_share, seed)]
    started = time.monotonic()
    problems += _check_videos(files, chosen, workers, timeout_s)
    return Verification(
        problems=tuple(problems),
        num_shards=len(shards.manifest.shards),
        num_samples=shards.num_samples,
        bytes=sum(size or 0 for size in sizes),
        read_s=read_s,
        num_decoded=len(chosen),
        decode_s=time.monotonic() - started,
    )


def _size(files: Store, entry: m.Shard) -> int | None:
    try:
        return files.size(entry.name)
    except OSError:
        return None


def _folder_problems(shards: m.ShardSet, files: Store) -> Iterator[Problem]:
    """The list of rejects, and tars that are not in the manifest (which a URL does not list)."""
    manifest, folder = shards.manifest, shards.folder
    try:
        files.discard(m.REJECTS)
        count = len(m.read_rejects(files.path(m.REJECTS).parent))
    except (UserError, OSError) as error:
        yield Problem(m.REJECTS, None, str(error))
    else:
        if count != manifest.num_rejects:
            message = f"has {count} lines, the manifest says {manifest.num_rejects} rejects"
            yield Problem(m.REJECTS, None, message)
    names = {entry.name for entry in manifest.shards}
    for path in sorted(folder.glob("*.tar")):
        if path.name not in names and not _is_empty(folder, path.name):
            yield Problem(path.name, None, "is in the folder, but the manifest does not name it")


def _is_empty(folder: Path, shard_name: str) -> bool:
    """Whether all videos of a shard were rejected: complete, but not in the manifest."""
    try:
        index = m.ShardIndex.model_validate_json((folder / m.index_name(shard_name)).read_bytes())
    except (OSError, ValidationError):
        return False
    return not index.samples


def _check_shards(shards: m.ShardSet, files: Store, workers: int) -> Iterator[Problem]:
    entries, names = shards.manifest.shards, shards.manifest.names_by_set
    calls = [(files, entry, names) for entry in entries]
    total = sum(entry.bytes for entry in entries)
    with tqdm(total=total, unit="B", unit_scale=True, desc="shards") as bar:
        # No time limit: the time for a shard depends on its size and the disk.
        results = killable_map(check_shard, calls, workers=workers, timeout_s=None)
        for entry, problems in zip(entries, results, strict=True):
            if isinstance(problems, Failed):
                yield Problem(entry.name, None, f"cannot be checked: {problems.message}")
            else:
                yield from problems
            bar.update(entry.bytes)


def check_shard(files: Store, entry: m.Shard, names: NamesBySet) -> list[Problem]:
    """All problems of one shard and its index, except those that only decoding shows."""
    files.discard(entry.name)
    files.discard(entry.index_name)
    try:
        descriptor = files.open(entry.name)
    except FileNotFoundError:
        return [Problem(entry.name, None, "the manifest names it, the folder lacks it")]
    except OSError as error:
        return [Problem(entry.name, None, f"cannot be read: {error.strerror or error}")]
    with open(descriptor, "rb"):  # noqa: PTH123  the cache keeps files that are open
        return _problems_of(files, entry, names)


def _problems_of(files: Store, entry: m.Shard, names: NamesBySet) -> list[Problem]:
    path = files.folder / entry.name
    altered = _alteration(path, entry)
    problems = [Problem(entry.name, None, altered)] if altered else []
    try:
        index = _trusted_index(files, entry)
    except DamagedError as error:
        return [*problems, Problem(entry.index_name, None, error.message)]
    members: list[Member] = []
    try:
        members.extend(tar.read_members(path))
    except DamagedError as error:
        problems.append(Problem(entry.name, None, error.message))
    findings = [*_member_problems(members, index), *_sample_problems(path, members, index, names)]
    if altered:
        message = "its video was altered (another CRC-32)"
        with path.open("rb") as file:
            findings += [(s.key, message) for s in index.samples if _read_video(file, s) is None]
    return problems + [Problem(entry.name, key, message) for key, message in findings]


def _alteration(path: Path, entry: m.Shard) -> str:
    """How the file differs from the manifest, or empty text."""
    size = path.stat().st_size
    if size != entry.bytes:
        return f"has {size} bytes, the manifest says {entry.bytes}: it was truncated or altered"
    if sha256_of(path) != entry.sha256:
        return "has another SHA-256 than the manifest says: it was altered"
    return ""


def _trusted_index(files: Store, entry: m.Shard) -> m.ShardIndex:
    """The index; its hash and its statements about the shard must match the manifest."""
    try:
        with open(files.open(entry.index_name), "rb") as file:  # noqa: PTH123
            data = file.read()
        if hashlib.sha256(data).hexdigest() != entry.index_sha256:
            raise DamagedError(None, "has another SHA-256 than the manifest says: it was altered")
        index = m.ShardIndex.model_validate_json(data)
    except OSError as error:
        raise DamagedError(None, f"cannot be read ({error.strerror or error})") from None
    except ValidationError as error:
        raise DamagedError(None, f"is not a valid index ({error.errors()[0]['msg']})") from None
    actual = (index.shard_bytes, index.shard_sha256, len(index.samples))
    if actual != (entry.bytes, entry.sha256, entry.samples):
        raise DamagedError(None, "has another size, SHA-256 or sample count than the manifest")
    return index


def _member_problems(members: list[Member], index: m.ShardIndex) -> Iterator[Finding]:
    """Members that are unsafe to unpack, occur twice, or belong to no sample."""
    expected = {
        f"{s.key}.{suffix}" for s in index.samples for suffix in (s.suffix, tar.FACTS_SUFFIX)
    }
    for name, count in Counter(member.name for member in members).items():
        if count > 1:
            yield None, f"member {name} occurs {count} times"
        if _is_unsafe(name):
            yield None, f"member {name} would be unpacked outside of a folder"
        elif name not in expected:
            yield None, f"member {name} belongs to no sample in the index"
    for member in members:
        if not member.is_file:
            yield None, f"member {member.name} is a link or a device, not a file"


def _sample_problems(
    path: Path, members: list[Member], index: m.ShardIndex, names: NamesBySet
) -> Iterator[Finding]:
    """Samples that are not where the index says, or whose facts describe another video."""
    places, facts_places = {member.name: member for member in members}, tar.facts_members(members)
    with path.open("rb") as file:
        for sample in index.samples:
            place = places.get(f"{sample.key}.{sample.suffix}")
            if place is None:
                yield sample.key, "is in the index, but not in the tar"
                continue
            if (place.offset, place.bytes) != (sample.offset, sample.bytes):
                yield (
                    sample.key,
                    f"has {place.bytes} bytes at {place.offset} of the tar, the index says "
                    f"{sample.bytes} bytes at {sample.offset}",
                )
            try:
                text = tar.read_member(file, facts_places, sample.key)
                facts = tar.parse_facts(text, sample)
            except DamagedError as error:
                yield sample.key, error.message
                continue
            numbers = {"": facts.label, **(facts.labels_by_set or {})}
            labels = {"": facts.label_name, **(facts.names_by_set or {})}
            for which, number in numbers.items():
                classes = names.get(which, ())
                if number is None:
                    continue
                if not 0 <= number < len(classes):
                    yield sample.key, f"has label {number}, the manifest {len(classes)} labels"
                elif classes[number] != (label := labels.get(which)):
                    message = f"has label '{label}', but number {number} is '{classes[number]}'"
                    yield sample.key, message


def _repeated_keys(shards: m.ShardSet) -> Iterator[Problem]:
    first: dict[str, str] = {}
    for number, entry in enumerate(shards.manifest.shards):
        for sample in _samples(shards, number):
            if sample.key in first:
                yield Problem(entry.name, sample.key, f"is in {first[sample.key]} as well")
            first.setdefault(sample.key, entry.name)


def _choose(
    shards: m.ShardSet, number: int, share: float, seed: int
) -> Iterator[tuple[str, m.IndexedSample]]:
    """A share of a shard's samples in their order, each with the shard's name."""
    samples = _samples(shards, number)
    count = min(len(samples), max(1, round(share * len(samples))))
    order = pick_generator(seed, number).permutation(len(samples))
    for place in sorted(order[:count]):
        yield shards.manifest.shards[number].name, samples[place]


def _samples(shards: m.ShardSet, number: int) -> tuple[m.IndexedSample, ...]:
    """The samples of a shard; none for a damaged index, which `check_shard` reports."""
    try:
        return shards.index(number).samples
    except UserError:
        return ()


def _check_videos(
    files: Store, chosen: list[tuple[str, m.IndexedSample]], workers: int, timeout_s: float
) -> Iterator[Problem]:
    calls = [(files, name, sample) for name, sample in chosen]
    results = killable_map(count_decodable, calls, workers=workers, timeout_s=timeout_s)
    bar = tqdm(results, total=len(chosen), unit="video", desc="decoding")
    for (name, sample), decodable in zip(chosen, bar, strict=True):
        if isinstance(decodable, Failed):
            message = f"does not decode: {decodable.reason}: {decodable.message}"
            yield Problem(name, sample.key, message)
        # The index has the frames that all decoders of the writing machine could read.
        elif not MIN_DECODABLE * decodable <= sample.num_frames <= decodable:
            message = f"{decodable} frames decode, the index says {sample.num_frames}"
            yield Problem(name, sample.key, message)


def count_decodable(files: Store, name: str, sample: m.IndexedSample) -> int:
    """How many frames of a video in the shard `name` decode. Errors: `RejectedError`, also for
    another CRC-32."""
    with open(files.open(name), "rb") as file:  # noqa: PTH123
        video = _read_video(file, sample)
    if video is None:
        raise RejectedError("altered", "it has another CRC-32 than the index says")
    return probe(io.BytesIO(video)).num_frames


def _read_video(file: BinaryIO, sample: m.IndexedSample) -> bytes | None:
    """A video, or None if its CRC-32 is not that of the index."""
    video = read_at(file.fileno(), sample.bytes, sample.offset)
    return video if zlib.crc32(video) == sample.crc32 else None
