"""A folder of shards copied unchanged, to a disk nearer to the GPUs.

Each file is copied under a temporary name, read back, compared, renamed. The manifest comes last
and says that the copy is complete. A second start copies what is missing or wrong.
"""

from __future__ import annotations

import concurrent.futures
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from arvideo_ds.errors import UserError
from arvideo_ds.files.atomic import PARTIAL, explained_when_full, replacing
from arvideo_ds.files.checksums import sha256_of
from arvideo_ds.files.locks import lock
from arvideo_ds.shards.manifest import MANIFEST, REJECTS, ShardSet
from arvideo_ds.shards.writer import require_space


@dataclass(frozen=True)
class StagedFile:
    """A file that the copy must have."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Staged:
    """What was done: files and bytes copied, and files that were right before."""

    num_copied: int
    bytes_copied: int
    num_kept: int


def stage(source: Path, output: Path, workers: int) -> Staged:
    """Copy the shards of `source` to `output`, `workers` files at a time.

    A second process with the same output waits until the first is done. Errors: `UserError` when
    the source is not what its manifest says, the output holds other shards, or its disk is full.
    """
    shards = ShardSet(source)
    shards.check_sizes()
    if output.resolve() == source.resolve():
        raise UserError(f"--output {output} is the folder to be copied; choose another.")
    files = _files(shards)
    with lock(output, wait=True), explained_when_full(output):
        _require_own(output, shards.hash, {file.name for file in files})
        for path in output.glob(f"*{PARTIAL}"):
            path.unlink()
        right = _each(lambda file: _is_right(output / file.name, file), files, workers, "checking")
        missing = [file for file, fine in zip(files, right, strict=True) if not fine]
        require_space(output, sum(file.bytes for file in missing))
        if missing and files[-1] not in missing:
            # Until all is right again, nobody must take the copy for complete.
            (output / MANIFEST).unlink()
            missing.append(files[-1])
        _each(lambda file: _copy(source, output, file), missing[:-1], workers, "copying")
        if missing:
            _copy(source, output, missing[-1])
    num_bytes = sum(file.bytes for file in missing)
    return Staged(len(missing), num_bytes, len(files) - len(missing))


def _files(shards: ShardSet) -> list[StagedFile]:
    """What belongs to the set, the manifest last."""
    files = []
    try:
        for entry in shards.manifest.shards:
            index_bytes = (shards.folder / entry.index_name).stat().st_size
            files.append(StagedFile(entry.name, entry.bytes, entry.sha256))
            files.append(StagedFile(entry.index_name, index_bytes, entry.index_sha256))
        rejects, manifest = shards.folder / REJECTS, shards.folder / MANIFEST
        files.append(StagedFile(REJECTS, rejects.stat().st_size, sha256_of(rejects)))
        files.append(StagedFile(MANIFEST, manifest.stat().st_size, shards.hash))
    except OSError as error:
        raise UserError(f"cannot read {error.filename} ({error.strerror}).") from None
    return files


def _require_own(output: Path, manifest_hash: str, names: set[str]) -> None:
    """Errors: `UserError` when the folder holds what is not of this set."""
    manifest = output / MANIFEST
    other = manifest.exists() and sha256_of(manifest) != manifest_hash
    strange = [
        path.name
        for pattern in ("*.tar", "*.index.json")
        for path in sorted(output.glob(pattern))
        if path.name not in names
    ]
    if other or strange:
        what = strange[0] if strange else MANIFEST
        raise UserError(
            f"{output} holds other shards ({what}). Choose another --output, or remove that folder."
        )


def _is_right(path: Path, file: StagedFile) -> bool:
    return path.is_file() and path.stat().st_size == file.bytes and sha256_of(path) == file.sha256


def _copy(source: Path, output: Path, file: StagedFile) -> None:
    with replacing(output / file.name) as partial:
        shutil.copyfile(source / file.name, partial)
        if not _is_right(partial, file):
            raise UserError(
                f"the copy of {source / file.name} is not what the manifest says: the file was "
                "altered, or a disk fails. To find out, run: "
                f"arvideo verify {source}"
            )


def _each(
    function: Callable[[StagedFile], Any], files: Sequence[StagedFile], workers: int, what: str
) -> list[Any]:
    """The function's results, in order. Threads do: copying and hashing leave Python alone."""
    results = []
    total = sum(file.bytes for file in files)
    executor = concurrent.futures.ThreadPoolExecutor(workers)
    with tqdm(total=total, unit="B", unit_scale=True, desc=what, disable=not total) as bar:
        try:
            for file, result in zip(files, executor.map(function, files), strict=True):
                results.append(result)
                bar.update(file.bytes)
        finally:
            # After an error nothing new is begun.
            executor.shutdown(cancel_futures=True)
    return results
