"""From entries to verified shards: parallel, restartable, byte-identical, nothing lost unsaid.

Videos are assigned to shards before any work, so a shard's content depends on the inputs alone, not
on workers or on when a run was cut off. Each video is read, probed and transcoded in a process
that is killed after a time limit. A shard is written to a temporary name, synced, renamed; its
index is written last and says that the shard is complete.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import shutil
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from arvideo_ds.decoding.decoders import decisive_decoders, load_decoders
from arvideo_ds.decoding.processes import Failed, killable_map
from arvideo_ds.decoding.video import MAX_PIXELS, TranscodeSettings
from arvideo_ds.errors import UserError
from arvideo_ds.files.atomic import PARTIAL, explained_when_full, write_bytes
from arvideo_ds.files.checksums import sha256_of
from arvideo_ds.files.locks import lock
from arvideo_ds.host import limit_memory
from arvideo_ds.randomness import split_generator
from arvideo_ds.shards import manifest as m
from arvideo_ds.shards.datasets import Entry, Listing, rules_to_store, safe_key
from arvideo_ds.shards.ingest import Sample, ingest

_GIB = 2**30


@dataclass(frozen=True)
class ShardJob:
    """What `write_shards` is to do. `transcode` None copies the files as they are."""

    dataset: str
    split: str | None
    listing: Listing
    output: Path
    transcode: TranscodeSettings | None
    samples_per_shard: int
    seed: int
    workers: int
    timeout_s: float
    # The largest frames, and what each process may allocate; 0: no limit.
    max_pixels: int = MAX_PIXELS
    memory_gib: float = 8.0


@dataclass(frozen=True)
class ShardReport:
    manifest: m.Manifest
    rejects_by_reason: dict[str, int]
    shards_kept: int
    # Sources of the videos written in this run in which the decoder reported errors.
    damaged: tuple[str, ...] = ()

    @property
    def share_left_out(self) -> float:
        manifest = self.manifest
        return manifest.num_rejects / (manifest.num_samples + manifest.num_rejects)

    def print_left_out(self, folder: Path) -> None:
        """Lines for people, where anything was left out or is damaged."""
        if self.manifest.num_rejects:
            reasons = by_reason(self.rejects_by_reason)
            where = folder / m.REJECTS
            print(f"left out: {self.manifest.num_rejects} ({reasons}); see {where}", flush=True)
        if self.damaged:
            print(
                f"note: {len(self.damaged):,} with decoder errors, such as {self.damaged[0]}: "
                "kept, with their number in the facts (decoder_errors)",
                flush=True,
            )


def write_shards(job: ShardJob) -> ShardReport:
    """Write what is missing of the job's shards, then manifest and rejects.

    Errors: `UserError` when another process writes to the folder, or it has shards of other inputs,
    the disk is too small, or no video was usable.
    """
    if job.transcode is None and any(entry.part for entry in job.listing.entries):
        raise UserError("samples that are parts of longer videos need --video transcode.")
    with lock(job.output):
        return _write_shards(job)


def _write_shards(job: ShardJob) -> ShardReport:
    inputs = _inputs_hash(job)
    deals = _deal(job)
    done = {name: complete_index(job.output, name, inputs) for name in deals}
    remove_leftovers(job.output, inputs)
    missing = {name: deal for name, deal in deals.items() if done[name] is None}
    if job.transcode is None:
        deal_bytes = (entry.path.stat().st_size for deal in missing.values() for entry in deal)
        require_space(job.output, sum(deal_bytes))
    with explained_when_full(job.output):
        damaged = _write_missing(job, missing, inputs)
    indices = {name: done[name] or complete_index(job.output, name, inputs) for name in deals}
    written = {name: index for name, index in indices.items() if index is not None}
    rejects = list(job.listing.rejects)
    rejects += [reject for index in written.values() for reject in index.rejects]
    manifest = write_manifest(
        job.output,
        written,
        rejects,
        dataset=job.dataset,
        split=job.split,
        labels=job.listing.labels,
        label_sets=job.listing.label_sets,
        settings=_settings(job),
    )
    reasons = Counter(reject.reason for reject in rejects)
    if not manifest.num_samples:
        raise UserError(
            f"none of the {len(job.listing.entries)} videos is usable ({by_reason(reasons)}); the "
            f"reasons are in {job.output / m.REJECTS}."
        )
    kept = len(deals) - len(missing)
    return ShardReport(manifest, dict(reasons.most_common()), kept, damaged)


def _inputs_hash(job: ShardJob) -> str:
    """Hash of all that decides the shards: settings and entries, with their sizes."""
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
    mode = "copy" if job.transcode is None else "transcode"
    transcode = {} if job.transcode is None else asdict(job.transcode)
    return {
        "video": mode,
        **transcode,
        "samples_per_shard": job.samples_per_shard,
        "seed": job.seed,
        # As before where the limit is the usual one: shards that exist keep their hashes.
        **({} if job.max_pixels == MAX_PIXELS else {"max_pixels": job.max_pixels}),
        **rules_to_store(job.dataset),
    }


def _deal(job: ShardJob) -> dict[str, list[Entry]]:
    """Shard name -> its entries. Shuffled once, so that a shard holds all classes."""
    shuffled = split_generator(job.seed).permutation(len(job.listing.entries))
    starts = range(0, len(shuffled), job.samples_per_shard)
    return {
        shard_name(job.dataset, job.split, number): [
            job.listing.entries[i] for i in shuffled[start : start + job.samples_per_shard]
        ]
        for number, start in enumerate(starts)
    }


def shard_name(dataset: str, split: str | None, number: int) -> str:
    stem = "-".join(part for part in (dataset, split) if part)
    return f"{stem}-{number:06d}.tar"


def complete_index(folder: Path, shard_name: str, inputs: str) -> m.ShardIndex | None:
    """The index of a complete shard of the same inputs, or None where work is left.

    Errors: `UserError` when it is a shard of other inputs.
    """
    path = folder / m.index_name(shard_name)
    if not path.exists():
        return None
    index = m.ShardIndex.model_validate_json(path.read_bytes())
    if index.inputs != inputs:
        raise UserError(
            f"{folder} holds shards of other videos, labels or settings (see {path.name}). Choose "
            "another --output, or remove that folder to make them anew."
        )
    shard = folder / shard_name
    intact = shard.exists() and shard.stat().st_size == index.shard_bytes
    return index if intact else None


def remove_leftovers(folder: Path, inputs: str) -> None:
    """Delete what an interrupted run left half written. Errors: as `complete_index`."""
    for path in folder.glob(f"*{PARTIAL}"):
        path.unlink()
    for path in folder.glob("*.index.json"):
        # Raises for foreign indices: nothing of another data set is ever overwritten.
        complete_index(folder, path.name.removesuffix(".index.json") + ".tar", inputs)


def require_space(folder: Path, needed: int) -> None:
    """Errors: `UserError` when the folder's disk has fewer bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder} has {free / _GIB:.2f} GiB free, the videos need about "
            f"{needed / _GIB:.2f} GiB. Free some space or choose another --output."
        )


def _write_missing(job: ShardJob, missing: dict[str, list[Entry]], inputs: str) -> tuple[str, ...]:
    """Returns the sources of the samples with decoder errors."""
    damaged: list[str] = []
    # tqdm shows rate and time left; results come in order, so shards close one after another.
    total = sum(len(deal) for deal in missing.values())
    with tqdm(total=total, unit="video", desc="shards", disable=not total) as bar:
        results = _ingest_all([entry for deal in missing.values() for entry in deal], job)
        for name, deal in missing.items():
            _write_shard(job, name, len(deal), _noting(results, damaged), inputs, bar)
    return tuple(damaged)


def _noting(
    results: Iterator[tuple[Entry, Sample | m.Reject]], damaged: list[str]
) -> Iterator[tuple[Entry, Sample | m.Reject]]:
    for entry, result in results:
        if isinstance(result, Sample) and "decoder_errors" in result.facts:
            damaged.append(entry.source_path)
        yield entry, result


def _ingest_all(
    entries: Sequence[Entry], job: ShardJob
) -> Iterator[tuple[Entry, Sample | m.Reject]]:
    """Each entry with its sample or the reason it has none, in order, a bounded number ahead."""
    max_pixels = job.max_pixels or sys.maxsize
    decoders = decisive_decoders()
    calls = ((entry.path, job.transcode, entry.part, max_pixels, decoders) for entry in entries)
    results = killable_map(
        ingest,
        calls,
        workers=job.workers,
        timeout_s=job.timeout_s,
        prepare=functools.partial(_prepare, decoders, job.memory_gib),
    )
    for entry, result in zip(entries, results, strict=True):
        yield entry, _rejected(entry, result) if isinstance(result, Failed) else result


def _rejected(entry: Entry, failed: Failed) -> m.Reject:
    return m.Reject(source_path=entry.source_path, reason=failed.reason, message=failed.message)


def _prepare(decoders: Sequence[str], memory_gib: float) -> None:
    """What a process does before its first video, whose time it is not."""
    load_decoders(decoders)
    if memory_gib:
        limit_memory(memory_gib)


def _write_shard(
    job: ShardJob,
    name: str,
    num_entries: int,
    results: Iterator[tuple[Entry, Sample | m.Reject]],
    inputs: str,
    bar: tqdm,
) -> None:
    labels, rejects = label_numbers(job.listing.labels or ()), []
    sets = job.listing.label_sets or {}
    numbers = {name: label_numbers(classes) for name, classes in sets.items()}

    def usable() -> Iterator[tuple[str, Sample]]:
        for entry, result in itertools.islice(results, num_entries):
            bar.update()
            if isinstance(result, m.Reject):
                rejects.append(result)
            else:
                facts = _all_facts(entry, result, labels, numbers)
                yield safe_key(entry.video_id), replace(result, facts=facts)

    write_shard(job.output, name, usable(), inputs, rejects)


def _all_facts(
    entry: Entry,
    sample: Sample,
    labels: dict[str | None, int],
    numbers: dict[str, dict[str | None, int]],
) -> dict[str, Any]:
    return {
        "video_id": entry.video_id,
        "source_path": entry.source_path,
        "label": labels.get(entry.label_name),
        "label_name": entry.label_name,
        **facts_of_sets(entry.names_by_set, numbers),
        **({"part": entry.part} if entry.part else {}),
        **entry.facts,
        **sample.facts,
    }


def facts_of_sets(
    names: Mapping[str, str] | None, numbers: Mapping[str, Mapping[str | None, int]]
) -> dict[str, Any]:
    """What the facts say of a sample's label in each set; nothing where it has one label.

    numbers: of every class by set and name.
    """
    if names is None:
        return {}
    by_set = {name: numbers[name][label] for name, label in names.items()}
    return {"labels_by_set": by_set, "names_by_set": dict(names)}


def label_numbers(names: Sequence[str]) -> dict[str | None, int]:
    """The number of each class by its name."""
    return {name: number for number, name in enumerate(names)}


def write_shard(
    folder: Path,
    name: str,
    samples: Iterable[tuple[str, Sample]],
    inputs: str,
    rejects: Sequence[m.Reject] = (),
) -> None:
    """One shard and its index from (key, sample) pairs; facts become the json member as they are.

    The same samples give the same bytes. inputs: hash of all that decides the content. rejects:
    read once the samples are through, so these may add to it.
    """
    import webdataset  # it imports torch, which takes seconds to load

    partial = folder / (name + PARTIAL)
    # Facts and check sum of each key.
    known: dict[str, tuple[dict[str, Any], int]] = {}
    with partial.open("wb") as file:
        # Fixed times and owners: the same videos give the same bytes.
        with webdataset.TarWriter(file, encoder=False, mtime=0, user="", group="") as tar:
            for key, sample in samples:
                text = json.dumps(sample.facts, ensure_ascii=False).encode()
                tar.write({"__key__": key, sample.suffix: sample.video, "json": text})
                known[key] = sample.facts, zlib.crc32(sample.video)
        file.flush()
        os.fsync(file.fileno())
    index = m.ShardIndex(
        inputs=inputs,
        shard_bytes=partial.stat().st_size,
        shard_sha256=sha256_of(partial),
        samples=tuple(_indexed(partial, known)),
        rejects=tuple(rejects),
    )
    partial.rename(folder / name)
    write_bytes(folder / m.index_name(name), m.dump_json(index))


def _indexed(
    tar_path: Path, known: dict[str, tuple[dict[str, Any], int]]
) -> Iterator[m.IndexedSample]:
    """Offsets as they are in the file: read back, not computed."""
    with tarfile.open(tar_path) as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            if suffix != "json":
                facts, crc32 = known[key]
                yield m.IndexedSample(
                    key=key,
                    suffix=suffix,
                    offset=member.offset_data,
                    bytes=member.size,
                    crc32=crc32,
                    num_frames=facts["num_frames"],
                    label=facts["label"],
                    labels_by_set=facts.get("labels_by_set"),
                )


def write_manifest(
    folder: Path,
    indices: Mapping[str, m.ShardIndex],
    rejects: Sequence[m.Reject],
    *,
    dataset: str,
    split: str | None,
    labels: tuple[str, ...] | None,
    settings: dict[str, str | int | None],
    label_sets: dict[str, tuple[str, ...]] | None = None,
) -> m.Manifest:
    """The rejects, then the manifest of the complete shards (name -> index) of a folder."""
    manifest = m.Manifest(
        dataset=dataset,
        split=split,
        labels=labels,
        label_sets=label_sets,
        settings=settings,
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


def by_reason(reasons: Mapping[str, int]) -> str:
    """Such as '3 truncated, 1 empty', the commonest first."""
    return ", ".join(f"{count} {name}" for name, count in Counter(reasons).most_common())
