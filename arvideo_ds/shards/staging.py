"""Copy a folder of shards unchanged to a local disk.

Each file is copied under a temporary name, read back, compared and renamed. The manifest, copied
last, marks the copy as complete. Another start copies the missing and wrong files.
"""

from __future__ import annotations

import concurrent.futures
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from arvideo_ds.errors import UserError
from arvideo_ds.files.atomic import PARTIAL, explained_when_full, replacing
from arvideo_ds.files.checksums import sha256_of
from arvideo_ds.files.locks import lock
from arvideo_ds.shards.manifest import MANIFEST, REJECTS, ShardSet
from arvideo_ds.shards.writer import require_space


class _File(NamedTuple):
    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Staged:
    """The number of copied files and bytes, and of files that were right before."""

    num_copied: int
    bytes_copied: int
    num_kept: int


def stage(source: Path, output: Path, workers: int) -> Staged:
    """Copy the shards of `source` to `output`, `workers` files at a time.

    A second process with the same output waits for the first. Errors: `UserError` where the source
    differs from its manifest, the output has other shards, or its disk is full.
    """
    shards = ShardSet(source)
    shards.check_sizes()
    if output.resolve() == source.resolve():
        raise UserError(f"--output {output} is the folder to copy; choose another.")
    files = _files(shards)
    with lock(output, wait=True), explained_when_full(output):
        _require_no_others(output, shards.hash, {file.name for file in files})
        for path in output.glob(f"*{PARTIAL}"):
            path.unlink()
        right = _each(lambda file: _is_right(output / file.name, file), files, workers, "checking")
        missing = [file for file, is_right in zip(files, right, strict=True) if not is_right]
        require_space(output, sum(file.bytes for file in missing))
        if missing and files[-1] not in missing:
            # The copy is not complete until all files are right.
            (output / MANIFEST).unlink()
            missing.append(files[-1])
        _each(lambda file: _copy(source, output, file), missing[:-1], workers, "copying")
        if missing:
            _copy(source, output, missing[-1])
    num_bytes = sum(file.bytes for file in missing)
    return Staged(len(missing), num_bytes, len(files) - len(missing))


def _files(shards: ShardSet) -> list[_File]:
    """The files of the set, the manifest last."""
    files = []

    def add(name: str, sha256: str) -> None:
        files.append(_File(name, (shards.folder / name).stat().st_size, sha256))

    try:
        for entry in shards.manifest.shards:
            files.append(_File(entry.name, entry.bytes, entry.sha256))
            add(entry.index_name, entry.index_sha256)
        add(REJECTS, sha256_of(shards.folder / REJECTS))
        add(MANIFEST, shards.hash)
    except OSError as error:
        raise UserError(f"cannot read {error.filename} ({error.strerror}).") from None
    return files


def _require_no_others(output: Path, manifest_hash: str, names: set[str]) -> None:
    """Errors: `UserError` where the folder has files of another set."""
    paths = [*sorted(output.glob("*.tar")), *sorted(output.glob("*.index.json"))]
    others = [path.name for path in paths if path.name not in names]
    manifest = output / MANIFEST
    if manifest.exists() and sha256_of(manifest) != manifest_hash:
        others.append(MANIFEST)
    if others:
        raise UserError(
            f"{output} has other shards ({others[0]}). Choose another --output, or remove that "
            "folder."
        )


def _is_right(path: Path, file: _File) -> bool:
    return path.is_file() and path.stat().st_size == file.bytes and sha256_of(path) == file.sha256


def _copy(source: Path, output: Path, file: _File) -> None:
    with replacing(output / file.name) as partial:
        shutil.copyfile(source / file.name, partial)
        if not _is_right(partial, file):
            raise UserError(
                f"the copy of {source / file.name} differs from the manifest: the file was "
                f"altered, or a disk fails. To check, run: arvideo verify {source}"
            )


def _each(
    function: Callable[[_File], Any], files: Sequence[_File], workers: int, title: str
) -> list[Any]:
    """The results, in order. In threads: copying and hashing release the GIL."""
    results = []
    total = sum(file.bytes for file in files)
    executor = concurrent.futures.ThreadPoolExecutor(workers)
    with tqdm(total=total, unit="B", unit_scale=True, desc=title, disable=not total) as bar:
        try:
            for file, result in zip(files, executor.map(function, files), strict=True):
                results.append(result)
                bar.update(file.bytes)
        finally:
            # After an error no other file is begun.
            executor.shutdown(cancel_futures=True)
    return results
