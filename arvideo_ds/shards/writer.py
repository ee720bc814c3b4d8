"""From entries to verified shards: parallel, restartable, byte-identical, every reject counted.

Videos are assigned to shards before any work, so a shard depends only on the inputs, not on
workers, parts or interruptions. An index, written after its shard, marks the shard as complete.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from arvideo_ds.decoding.decoders import decisive_decoders, load_decoders
from arvideo_ds.decoding.processes import Failed, killable_map
from arvideo_ds.decoding.video import MAX_PIXELS, TranscodeSettings
from arvideo_ds.errors import UserError
from arvideo_ds.files.atomic import PARTIAL, explained_when_full, replacing, write_bytes
from arvideo_ds.files.checksums import sha256_of
from arvideo_ds.files.locks import lock
from arvideo_ds.host import limit_memory
from arvideo_ds.randomness import split_generator
from arvideo_ds.shards import manifest as m
from arvideo_ds.shards.datasets import Entry, Listing, rules_to_store, safe_key
from arvideo_ds.shards.ingest import Sample, ingest
from arvideo_ds.shards.members import read_members
from arvideo_ds.shards.parts import (
    Part,
    Progress,
    lock_end,
    lock_part,
    missing_shards,
    remove_leftovers,
    remove_leftovers_of_all,
    require_all,
)
from arvideo_ds.shards.video_files import IMAGE_SUFFIXES

_GIB = 2**30
Item = TypeVar("Item")
# A sample with its key, or the reason why there is none.
Result = tuple[str, Sample] | m.Reject


@dataclass(frozen=True)
class ShardJob:
    """The arguments of `write_shards`. transcode: None copies the files unchanged.

    Errors: `UserError` for unchanged parts of videos, or images.
    """

    dataset: str
    split: str | None
    listing: Listing
    output: Path
    transcode: TranscodeSettings | None
    samples_per_shard: int
    seed: int
    workers: int
    timeout_s: float
    # Limits of a frame and of a process's memory; 0: none.
    max_pixels: int = MAX_PIXELS
    memory_gib: float = 8.0

    def __post_init__(self) -> None:
        if self.transcode is not None:
            return
        if any(entry.part for entry in self.listing.entries):
            raise UserError("samples that are parts of longer videos need --video transcode.")
        if any(entry.path.suffix.lower() in IMAGE_SUFFIXES for entry in self.listing.entries):
            raise UserError("images become videos of one frame: they need --video transcode.")

    @property
    def stem(self) -> str:
        """The start of the shards' names."""
        return "-".join(filter(None, (self.dataset, self.split)))

    @property
    def shard_names(self) -> list[str]:
        return shard_names(self.stem, len(self.listing.entries), self.samples_per_shard)


@dataclass(frozen=True)
class ShardReport:
    manifest: m.Manifest
    rejects_by_reason: dict[str, int]
    shards_kept: int
    # Sources of the videos of this run with decoder errors.
    damaged: tuple[str, ...] = ()

    @property
    def rejected_share(self) -> float:
        manifest = self.manifest
        return manifest.num_rejects / (manifest.num_samples + manifest.num_rejects)

    def print_rejects(self, folder: Path) -> None:
        """Print the numbers of rejects and of damaged videos."""
        if self.manifest.num_rejects:
            reasons = by_reason(self.rejects_by_reason)
            where = folder / m.REJECTS
            print(f"rejected: {self.manifest.num_rejects} ({reasons}); see {where}", flush=True)
        print_damaged(self.damaged)


@dataclass(frozen=True)
class PartReport:
    """The shards of one part. whole: the report of all parts, if this was the last one."""

    indices: Mapping[str, m.ShardIndex]
    shards_kept: int
    damaged: tuple[str, ...]
    num_missing: int
    whole: ShardReport | None


def print_damaged(sources: Sequence[str]) -> None:
    if sources:
        print(
            f"note: {len(sources):,} with decoder errors, such as {sources[0]}: kept, with their "
            "number in the facts (decoder_errors)",
            flush=True,
        )


def write_shards(job: ShardJob) -> ShardReport:
    """Write the missing shards of the job, then manifest and rejects.

    Errors: `UserError` where another process writes to the folder, it has shards of other inputs,
    the disk is too small, or no video is usable.
    """
    damaged: list[str] = []
    with lock(job.output):
        indices, kept = _write_missing(job, _inputs_hash(job), damaged)
        remove_leftovers(job.output)
        return _write_report(job, indices, kept, damaged)


def write_part(job: ShardJob, part: Part) -> PartReport:
    """Write the missing shards of a part; the last part also writes manifest and rejects.

    Errors: `UserError` as of `write_shards`, and where a process writes this part, or another part
    with other inputs or decoders.
    """
    damaged: list[str] = []
    inputs = _inputs_hash(job)
    with_decoders = hashlib.sha256(f"{inputs} {decisive_decoders()}".encode()).hexdigest()
    whole = None
    with lock_part(job.output, part, with_decoders):
        indices, kept = _write_missing(job, inputs, damaged, part)
        missing = missing_shards(job.output, job.shard_names)
        # Of parts that end together, the one whose index is the last in the folder misses none.
        if not missing:
            whole = _finish(job, inputs, damaged)
    if whole:
        remove_leftovers_of_all(job.output)
    return PartReport(indices, kept, tuple(damaged), len(missing), whole)


def finish_parts(job: ShardJob) -> ShardReport:
    """Write manifest and rejects of the shards that parts have written.

    Errors: `UserError` where a shard is missing, with the parts to repeat, or has other inputs; a
    process writes to the folder without parts; or no video is usable.
    """
    report = _finish(job, _inputs_hash(job))
    remove_leftovers_of_all(job.output)
    return report


def _finish(job: ShardJob, inputs: str, damaged: Sequence[str] = ()) -> ShardReport:
    names = job.shard_names
    with lock_end(job.output):
        complete = {name: complete_index(job.output, name, inputs) for name in names}
        require_all(job.output, names, [name for name in names if complete[name] is None])
        indices = {name: index for name, index in complete.items() if index}
        return _write_report(job, indices, 0, damaged)


def _write_missing(
    job: ShardJob, inputs: str, damaged: list[str], part: Part | None = None
) -> tuple[dict[str, m.ShardIndex], int]:
    """As `write_missing`. Adds the sources of the samples with decoder errors to `damaged`."""
    # Shuffled, so that each shard has all classes.
    shuffled = split_generator(job.seed).permutation(len(job.listing.entries))
    return write_missing(
        job.output,
        job.stem,
        [job.listing.entries[number] for number in shuffled],
        job.samples_per_shard,
        inputs,
        read=partial(_ingest_all, job, damaged),
        # The size of a transcoded video is not known before.
        num_bytes=lambda entry: 0 if job.transcode else entry.path.stat().st_size,
        title=f"part {part}" if part else "shards",
        part=part,
    )


def _write_report(
    job: ShardJob, indices: Mapping[str, m.ShardIndex], kept: int, damaged: Iterable[str]
) -> ShardReport:
    return write_report(
        job.output,
        indices,
        job.listing.rejects,
        kept,
        damaged,
        dataset=job.dataset,
        split=job.split,
        labels=job.listing.labels,
        label_sets=job.listing.label_sets,
        settings=_settings(job),
    )


def _inputs_hash(job: ShardJob) -> str:
    """Hash of all that determines the shards: settings and entries, with their sizes."""
    content = {
        "version": m.VERSION,
        "settings": _settings(job),
        "dataset": job.dataset,
        "split": job.split,
        "entries": [
            (e.video_id, e.source_path, e.label_name, e.part, e.facts, e.path.stat().st_size)
            for e in job.listing.entries
        ],
        "labels": job.listing.labels,
        "rejects": [reject.model_dump() for reject in job.listing.rejects],
    }
    if job.listing.label_sets is not None:
        content["label_sets"] = job.listing.label_sets
        content["names_by_set"] = [entry.names_by_set for entry in job.listing.entries]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _settings(job: ShardJob) -> dict[str, str | int | None]:
    transcode = {} if job.transcode is None else asdict(job.transcode)
    if transcode.get("layers") == 1:
        # Existing shards keep their hashes.
        del transcode["layers"]
    return {
        "video": "transcode" if job.transcode else "copy",
        **transcode,
        "samples_per_shard": job.samples_per_shard,
        "seed": job.seed,
        # Only a limit that differs: existing shards keep their hashes.
        **({} if job.max_pixels == MAX_PIXELS else {"max_pixels": job.max_pixels}),
        **rules_to_store(job.dataset),
    }


def shard_names(stem: str, num_items: int, samples_per_shard: int) -> list[str]:
    """The names of all shards, in order."""
    count = -(-num_items // samples_per_shard)
    return [f"{stem}-{number:06d}.tar" for number in range(count)]


def write_missing(
    folder: Path,
    stem: str,
    items: Sequence[Item],
    samples_per_shard: int,
    inputs: str,
    *,
    read: Callable[[list[Item]], Iterator[Result]],
    num_bytes: Callable[[Item], int],
    title: str,
    part: Part | None = None,
) -> tuple[dict[str, m.ShardIndex], int]:
    """The indices of all shards, and the number of shards that were complete; writes the others.

    stem: of the shards' names. read: the result of each item, in order. num_bytes: the disk space
    for an item. title: of the progress bar. part: only its shards. Errors: `UserError` where the
    folder has shards of other inputs, or its disk is too small.
    """
    names = shard_names(stem, len(items), samples_per_shard)
    shards = {
        name: items[number * samples_per_shard : (number + 1) * samples_per_shard]
        for number, name in enumerate(names)
    }
    own = part.of(names) if part else names
    complete = {name: complete_index(folder, name, inputs) for name in own}
    files = {file for name in own for file in (name, m.index_name(name))}
    for path in folder.glob(f"*{PARTIAL}"):
        if part is None or path.name.removesuffix(PARTIAL) in files:
            path.unlink()
    # Raises for indices of other inputs: another data set is never overwritten. Parts have checked
    # this one after the other, so one index stands for all.
    others = (path for path in folder.glob("*.index.json") if path.name not in files)
    for path in itertools.islice(others, 1 if part else None):
        complete_index(folder, path.name.removesuffix(".index.json") + ".tar", inputs)
    missing = [name for name, index in complete.items() if index is None]
    unwritten = [item for name in missing for item in shards[name]]
    require_space(folder, sum(map(num_bytes, unwritten)))
    progress = Progress(folder, names) if part and unwritten else None
    indices = {}
    with (
        explained_when_full(folder),
        tqdm(total=len(unwritten), unit="video", desc=title, disable=not unwritten) as bar,
    ):
        results = _counted(read(unwritten), bar, progress)
        for name, index in complete.items():
            of_shard = itertools.islice(results, len(shards[name]))
            indices[name] = index or write_shard(folder, name, of_shard, inputs)
    return indices, len(own) - len(missing)


def _counted(results: Iterator[Result], bar: tqdm, progress: Progress | None) -> Iterator[Result]:
    for result in results:
        bar.update()
        if progress:
            progress.show(bar)
        yield result


def complete_index(folder: Path, shard_name: str, inputs: str) -> m.ShardIndex | None:
    """The index of a complete shard, or None. Errors: `UserError` for a shard of other inputs."""
    path = folder / m.index_name(shard_name)
    if not path.exists():
        return None
    index = m.ShardIndex.model_validate_json(path.read_bytes())
    if index.inputs != inputs:
        raise UserError(
            f"{folder} has shards of other videos, labels or settings (see {path.name}). Choose "
            "another --output, or remove that folder to make them again."
        )
    shard = folder / shard_name
    intact = shard.exists() and shard.stat().st_size == index.shard_bytes
    return index if intact else None


def require_space(folder: Path, needed: int) -> None:
    """Errors: `UserError` where the folder's disk has fewer free bytes."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder} has {free / _GIB:.2f} GiB free, the videos need about "
            f"{needed / _GIB:.2f} GiB. Free some space or choose another --output."
        )


def _ingest_all(job: ShardJob, damaged: list[str], entries: Sequence[Entry]) -> Iterator[Result]:
    """Adds the sources of the samples with decoder errors to `damaged`."""
    decoders = decisive_decoders()
    max_pixels = job.max_pixels or sys.maxsize
    results = killable_map(
        ingest,
        ((entry.path, job.transcode, entry.part, max_pixels, decoders) for entry in entries),
        workers=job.workers,
        timeout_s=job.timeout_s,
        prepare=partial(_prepare, decoders, job.memory_gib),
    )
    label_facts = LabelFacts(job.listing.labels, job.listing.label_sets)
    for entry, result in zip(entries, results, strict=True):
        if isinstance(result, Failed):
            yield rejected(entry.source_path, result)
            continue
        if "decoder_errors" in result.facts:
            damaged.append(entry.source_path)
        facts = {
            "video_id": entry.video_id,
            "source_path": entry.source_path,
            **label_facts(entry.label_name, entry.names_by_set),
            **({"part": entry.part} if entry.part else {}),
            **entry.facts,
            **result.facts,
        }
        yield safe_key(entry.video_id), replace(result, facts=facts)


def _prepare(decoders: Sequence[str], memory_gib: float) -> None:
    """Prepare a process, outside of the time limit of its first video."""
    load_decoders(decoders)
    if memory_gib:
        limit_memory(memory_gib)


def rejected(source_path: str, failed: Failed) -> m.Reject:
    return m.Reject(source_path=source_path, reason=failed.reason, message=failed.message)


class LabelFacts:
    """The facts about a sample's label: number and name, also in each label set."""

    def __init__(
        self, labels: Sequence[str] | None, label_sets: Mapping[str, Sequence[str]] | None
    ) -> None:
        self._labels = label_numbers(labels or ())
        self._sets = {name: label_numbers(classes) for name, classes in (label_sets or {}).items()}

    def __call__(
        self, label_name: str | None, names_by_set: Mapping[str, str] | None
    ) -> dict[str, Any]:
        facts: dict[str, Any] = {"label": self._labels.get(label_name), "label_name": label_name}
        if names_by_set is not None:
            by_set = {name: self._sets[name][label] for name, label in names_by_set.items()}
            facts |= {"labels_by_set": by_set, "names_by_set": dict(names_by_set)}
        return facts


def label_numbers(names: Sequence[str]) -> dict[str | None, int]:
    """The number of each class by its name."""
    return {name: number for number, name in enumerate(names)}


def write_shard(folder: Path, name: str, results: Iterable[Result], inputs: str) -> m.ShardIndex:
    """Write one shard and its index; facts become the json member unchanged.

    The same samples give the same bytes. inputs: hash of all that determines the content.
    """
    import webdataset  # it imports torch, which takes seconds to load

    rejects: list[m.Reject] = []
    # Facts and checksum of each key.
    written: dict[str, tuple[dict[str, Any], int]] = {}
    path = folder / name
    with (
        replacing(path) as unfinished,
        unfinished.open("wb") as file,
        # Fixed times and owners: the same videos give the same bytes.
        webdataset.TarWriter(file, encoder=False, mtime=0, user="", group="") as tar,
    ):
        for result in results:
            if isinstance(result, m.Reject):
                rejects.append(result)
                continue
            key, sample = result
            text = json.dumps(sample.facts, ensure_ascii=False).encode()
            tar.write({"__key__": key, sample.suffix: sample.video, "json": text})
            written[key] = sample.facts, zlib.crc32(sample.video)
    return write_index(path, inputs, _indexed(path, written), rejects)


def write_index(
    path: Path, inputs: str, samples: Iterable[m.IndexedSample], rejects: Iterable[m.Reject]
) -> m.ShardIndex:
    """Write the index of a complete tar beside it."""
    index = m.ShardIndex(
        inputs=inputs,
        shard_bytes=path.stat().st_size,
        shard_sha256=sha256_of(path),
        samples=tuple(samples),
        rejects=tuple(rejects),
    )
    write_bytes(path.with_name(m.index_name(path.name)), m.dump_json(index))
    return index


def _indexed(
    path: Path, written: dict[str, tuple[dict[str, Any], int]]
) -> Iterator[m.IndexedSample]:
    """Offsets are read from the file, not computed."""
    for member in read_members(path):
        key, _, suffix = member.name.partition(".")
        if suffix != "json":
            facts, crc32 = written[key]
            yield m.IndexedSample(
                key=key,
                suffix=suffix,
                offset=member.offset,
                bytes=member.bytes,
                crc32=crc32,
                num_frames=facts["num_frames"],
                label=facts["label"],
                labels_by_set=facts.get("labels_by_set"),
            )


def write_manifest(
    folder: Path, indices: Mapping[str, m.ShardIndex], rejects: Sequence[m.Reject], **fields: Any
) -> m.Manifest:
    """Write the rejects, then the manifest of the complete shards (name -> index) of a folder.

    fields: dataset, split, labels, label_sets and settings of the `Manifest`.
    """
    manifest = m.Manifest(
        **fields,
        num_samples=sum(len(index.samples) for index in indices.values()),
        num_rejects=len(rejects),
        shards=tuple(
            m.Shard(
                name=name,
                samples=len(index.samples),
                bytes=index.shard_bytes,
                sha256=index.shard_sha256,
                index_sha256=sha256_of(folder / m.index_name(name)),
            )
            for name, index in indices.items()
            if index.samples
        ),
    )
    lines = [json.dumps(reject.model_dump(), ensure_ascii=False) + "\n" for reject in rejects]
    write_bytes(folder / m.REJECTS, "".join(lines).encode())
    write_bytes(folder / m.MANIFEST, m.dump_json(manifest))
    return manifest


def write_report(
    folder: Path,
    indices: Mapping[str, m.ShardIndex],
    rejects: Iterable[m.Reject],
    shards_kept: int,
    damaged: Iterable[str] = (),
    **fields: Any,
) -> ShardReport:
    """Write rejects and manifest. rejects: those before the indices'. fields: of the manifest.

    Errors: `UserError` where no video is usable.
    """
    rejects = [*rejects, *(reject for index in indices.values() for reject in index.rejects)]
    reasons = Counter(reject.reason for reject in rejects)
    manifest = write_manifest(folder, indices, rejects, **fields)
    if not manifest.num_samples:
        raise UserError(
            f"none of the {len(rejects)} videos is usable ({by_reason(reasons)}); the reasons "
            f"are in {folder / m.REJECTS}."
        )
    return ShardReport(manifest, dict(reasons.most_common()), shards_kept, tuple(damaged))


def by_reason(reasons: Mapping[str, int]) -> str:
    """Such as '3 truncated, 1 empty', the most frequent first."""
    return ", ".join(f"{count} {name}" for name, count in Counter(reasons).most_common())
