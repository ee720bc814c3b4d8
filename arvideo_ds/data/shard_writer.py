"""From entries to verified shards: parallel, restartable, byte-identical, nothing lost unsaid.

Videos are dealt to shards before any work, so a shard's content depends on the inputs alone, not
on workers or on when a run was cut off. Each video is read, probed and transcoded in a process
that is killed after a time limit. A shard is written to a temporary name, synced, renamed; its
index is written last and says that the shard is complete.
"""

from __future__ import annotations

import concurrent.futures
import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import tarfile
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pebble
import webdataset
from tqdm import tqdm

from arvideo_ds.data import manifest as m
from arvideo_ds.data.datasets import Entry, Listing, safe_key
from arvideo_ds.data.ingest import Sample, ingest
from arvideo_ds.data.video import RejectedError, TranscodeSettings
from arvideo_ds.errors import UserError
from arvideo_ds.randomness import split_generator

_TEMPORARY = ".partial"
# Processes are replaced after so many videos: native decoders leak.
_VIDEOS_PER_PROCESS = 200
_GIB = 2**30
_BLOCK = 2**20


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


@dataclass(frozen=True)
class ShardReport:
    manifest: m.Manifest
    rejects_by_reason: dict[str, int]
    shards_kept: int


def write_shards(job: ShardJob) -> ShardReport:
    """Write what is missing of the job's shards, then manifest and rejects.

    Errors: `UserError` when the folder holds shards of other inputs, the disk is too small, or no
    video was usable.
    """
    if job.transcode is None and any(entry.part for entry in job.listing.entries):
        raise UserError("samples that are parts of longer videos need --video transcode.")
    job.output.mkdir(parents=True, exist_ok=True)
    inputs = _inputs_hash(job)
    deals = _deal(job)
    done = {name: _complete_index(job.output, name, inputs) for name in deals}
    _remove_leftovers(job.output, inputs)
    missing = {name: deal for name, deal in deals.items() if done[name] is None}
    _require_space(job, missing)
    try:
        _write_missing(job, missing, inputs)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{job.output} is full ({error.strerror}). Free some space; the same command goes on "
            "after the last complete shard."
        ) from None
    indices = {name: done[name] or _complete_index(job.output, name, inputs) for name in deals}
    written = {name: index for name, index in indices.items() if index is not None}
    manifest, rejects = _write_manifest(job, written)
    reasons = Counter(reject.reason for reject in rejects)
    if not manifest.num_samples:
        raise UserError(
            f"none of the {len(job.listing.entries)} videos is usable ({_by_reason(reasons)}); the "
            f"reasons stand in {job.output / m.REJECTS}."
        )
    return ShardReport(manifest, dict(reasons.most_common()), len(deals) - len(missing))


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
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _settings(job: ShardJob) -> dict[str, str | int | None]:
    mode = "copy" if job.transcode is None else "transcode"
    transcode = {} if job.transcode is None else asdict(job.transcode)
    return {
        "video": mode,
        **transcode,
        "samples_per_shard": job.samples_per_shard,
        "seed": job.seed,
    }


def _deal(job: ShardJob) -> dict[str, list[Entry]]:
    """Shard name -> its entries. Shuffled once, so that a shard holds all classes."""
    shuffled = split_generator(job.seed).permutation(len(job.listing.entries))
    stem = "-".join(part for part in (job.dataset, job.split) if part)
    starts = range(0, len(shuffled), job.samples_per_shard)
    return {
        f"{stem}-{number:06d}.tar": [
            job.listing.entries[i] for i in shuffled[start : start + job.samples_per_shard]
        ]
        for number, start in enumerate(starts)
    }


def _complete_index(folder: Path, shard_name: str, inputs: str) -> m.ShardIndex | None:
    """The index of a complete shard of the same inputs, or None where work is left."""
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


def _remove_leftovers(folder: Path, inputs: str) -> None:
    for path in folder.glob(f"*{_TEMPORARY}"):
        path.unlink()
    for path in folder.glob("*.index.json"):
        # Raises for foreign indices: nothing of another data set is ever overwritten.
        _complete_index(folder, path.name.removesuffix(".index.json") + ".tar", inputs)


def _require_space(job: ShardJob, missing: dict[str, list[Entry]]) -> None:
    needed = sum(entry.path.stat().st_size for deal in missing.values() for entry in deal)
    free = shutil.disk_usage(job.output).free
    if job.transcode is None and needed > free:
        raise UserError(
            f"{job.output} has {free / _GIB:.2f} GiB free, the videos need about "
            f"{needed / _GIB:.2f} GiB. Free some space or choose another --output."
        )


def _write_missing(job: ShardJob, missing: dict[str, list[Entry]], inputs: str) -> None:
    # tqdm shows rate and time left; results come in order, so shards close one after another.
    total = sum(len(deal) for deal in missing.values())
    with tqdm(total=total, unit="video", desc="shards", disable=not total) as bar:
        results = _ingest_all([entry for deal in missing.values() for entry in deal], job)
        for name, deal in missing.items():
            _write_shard(job, name, len(deal), results, inputs, bar)


def _ingest_all(
    entries: Sequence[Entry], job: ShardJob
) -> Iterator[tuple[Entry, Sample | m.Reject]]:
    """Each entry with its sample or the reason it has none, in order, a bounded number ahead."""
    waiting: deque[tuple[Entry, concurrent.futures.Future[Sample]]] = deque()
    # spawn: a forked child would inherit locks of this process's threads.
    pool = pebble.ProcessPool(
        max_workers=job.workers,
        max_tasks=_VIDEOS_PER_PROCESS,
        context=multiprocessing.get_context("spawn"),
    )
    try:
        upcoming = iter(entries)
        while True:
            while len(waiting) < 4 * job.workers and (entry := next(upcoming, None)):
                future = pool.schedule(
                    ingest, args=(entry.path, job.transcode, entry.part), timeout=job.timeout_s
                )
                waiting.append((entry, future))
            if not waiting:
                break
            entry, future = waiting.popleft()
            yield entry, _result(entry, future, job.timeout_s)
    finally:
        pool.stop()
        pool.join()


def _result(
    entry: Entry, future: concurrent.futures.Future[Sample], timeout_s: float
) -> Sample | m.Reject:
    try:
        return future.result()
    except RejectedError as error:
        reason, message = error.reason, error.message
    except concurrent.futures.TimeoutError:
        reason, message = "timeout", f"no result within {timeout_s:g} s; its process was killed"
    except pebble.ProcessExpired as error:
        reason, message = "crash", f"the decoder's process died ({error})"
    except Exception as error:  # a decoder's own bug must not stop the other videos
        reason, message = "error", f"{type(error).__name__}: {error}"
    return m.Reject(source_path=entry.source_path, reason=reason, message=message)


def _write_shard(
    job: ShardJob,
    name: str,
    num_entries: int,
    results: Iterator[tuple[Entry, Sample | m.Reject]],
    inputs: str,
    bar: tqdm,
) -> None:
    folder, labels = job.output, _label_numbers(job)
    partial = folder / (name + _TEMPORARY)
    written: dict[str, tuple[Entry, Sample]] = {}
    rejects: list[m.Reject] = []
    with partial.open("wb") as file:
        # Fixed times and owners: the same videos give the same bytes.
        with webdataset.TarWriter(file, encoder=False, mtime=0, user="", group="") as tar:
            for _ in range(num_entries):
                entry, result = next(results)
                bar.update()
                if isinstance(result, m.Reject):
                    rejects.append(result)
                    continue
                key = safe_key(entry.video_id)
                tar.write(_member(key, entry, result, labels))
                # The bytes are on disk now; only the facts are still needed.
                written[key] = (entry, Sample(b"", result.suffix, result.facts))
        file.flush()
        os.fsync(file.fileno())
    index = m.ShardIndex(
        inputs=inputs,
        shard_bytes=partial.stat().st_size,
        shard_sha256=_sha256(partial),
        samples=tuple(_indexed(partial, written, labels)),
        rejects=tuple(rejects),
    )
    partial.rename(folder / name)
    _write_atomically(folder / m.index_name(name), m.dump_json(index))


def _member(
    key: str, entry: Entry, sample: Sample, labels: dict[str | None, int]
) -> dict[str, str | bytes]:
    facts = {
        "video_id": entry.video_id,
        "source_path": entry.source_path,
        "label": labels.get(entry.label_name),
        "label_name": entry.label_name,
        **({"part": entry.part} if entry.part else {}),
        **entry.facts,
        **sample.facts,
    }
    return {
        "__key__": key,
        sample.suffix: sample.video,
        "json": json.dumps(facts, ensure_ascii=False).encode(),
    }


def _label_numbers(job: ShardJob) -> dict[str | None, int]:
    return {name: number for number, name in enumerate(job.listing.labels or ())}


def _indexed(
    tar_path: Path, written: dict[str, tuple[Entry, Sample]], labels: dict[str | None, int]
) -> Iterator[m.IndexedSample]:
    """Offsets as they really stand in the file: read back, not computed."""
    with tarfile.open(tar_path) as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            entry, sample = written[key]
            if suffix == sample.suffix:
                yield m.IndexedSample(
                    key=key,
                    suffix=suffix,
                    offset=member.offset_data,
                    bytes=member.size,
                    num_frames=sample.facts["num_frames"],
                    label=labels.get(entry.label_name),
                )


def _write_manifest(
    job: ShardJob, indices: dict[str, m.ShardIndex]
) -> tuple[m.Manifest, list[m.Reject]]:
    rejects = list(job.listing.rejects)
    rejects += [reject for index in indices.values() for reject in index.rejects]
    manifest = m.Manifest(
        dataset=job.dataset,
        split=job.split,
        labels=job.listing.labels,
        settings=_settings(job),
        num_samples=sum(len(index.samples) for index in indices.values()),
        num_rejects=len(rejects),
        shards=tuple(
            m.Shard(
                name=name,
                samples=len(index.samples),
                bytes=index.shard_bytes,
                sha256=index.shard_sha256,
                index_sha256=_sha256(job.output / m.index_name(name)),
            )
            for name, index in indices.items()
            if index.samples
        ),
    )
    lines = [json.dumps(reject.model_dump(), ensure_ascii=False) + "\n" for reject in rejects]
    _write_atomically(job.output / m.REJECTS, "".join(lines).encode())
    _write_atomically(job.output / m.MANIFEST, m.dump_json(manifest))
    return manifest, rejects


def _write_atomically(path: Path, data: bytes) -> None:
    partial = path.with_name(path.name + _TEMPORARY)
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _by_reason(reasons: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
