"""What a user points a tool at: a folder of videos, a list, shards, or one file -> videos."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from arvideo_ds.decoding.video import Part, RejectedError
from arvideo_ds.errors import UserError
from arvideo_ds.shards.datasets.generic import read_csv, read_jsonl
from arvideo_ds.shards.datasets.listing import Entry, Source, file_entry, missing
from arvideo_ds.shards.manifest import MANIFEST, IndexedSample, Reject, ShardSet
from arvideo_ds.shards.video_files import VIDEO_SUFFIXES, find_videos

_LISTS = {".csv": read_csv, ".jsonl": read_jsonl}
_BLOCK = 2**20


@dataclass(frozen=True)
class FileVideo:
    """A file, or a part of one. path: below the input; key: the same, made unique by the part."""

    key: str
    path: str
    label: str | None
    file: Path
    num_bytes: int
    part: Part | None = None

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """The bytes, to read and seek in. Errors: `RejectedError`."""
        try:
            with self.file.open("rb") as file:
                if not file.read(1):
                    raise RejectedError("empty", "the file has 0 bytes")
                file.seek(0)
                yield file
        except OSError as error:
            raise RejectedError("unreadable", str(error)) from None


@dataclass(frozen=True)
class ShardVideo:
    """A video in a shard. key: its key there; path: shard and member."""

    key: str
    path: str
    label: str | None
    folder: str
    shard: int
    sample: IndexedSample
    part: Part | None = None

    @property
    def num_bytes(self) -> int:
        return self.sample.bytes

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """The bytes, to read and seek in; checked, never held whole. Errors: `RejectedError`."""
        member = _Member(_shards(self.folder), self.shard, self.sample)
        crc32 = 0
        while block := member.read(_BLOCK):
            crc32 = zlib.crc32(block, crc32)
        if crc32 != self.sample.crc32:
            raise RejectedError("altered", "its bytes in the shard are not those once written")
        member.seek(0)
        yield io.BufferedReader(member)


Video = FileVideo | ShardVideo


@dataclass(frozen=True)
class VideoList:
    """Videos of an input, sorted by key, and what of it leads to no video.

    identity: names the input and, for shards, their content. passed_over: files of a folder whose
    suffix is not a video's, by suffix.
    """

    videos: tuple[Video, ...]
    rejects: tuple[Reject, ...]
    identity: str
    passed_over: Mapping[str, int] = field(default_factory=dict)


def list_videos(
    source: str, *, videos: Path | None = None, skip_bad_rows: bool = False
) -> VideoList:
    """A folder (searched at any depth), a CSV or JSONL (column `path`), shards, or one video.

    videos: where the paths of a list begin, by default the list's own folder. skip_bad_rows: rows
    that name no video are rejects. Errors: `UserError` when there is nothing, a row is wrong, or
    a video is named twice.
    """
    path, passed_over = Path(source), Counter[str]()
    if "://" in source or (path / MANIFEST).is_file():
        return _from_shards(source)
    if path.suffix.lower() in _LISTS and path.is_file():
        listing = _LISTS[path.suffix.lower()](
            Source(videos or path.parent, annotations=path, skip_bad_rows=skip_bad_rows)
        )
        found, rejects = listing.entries, listing.rejects
    elif path.is_dir():
        found, rejects = _from_folder(path, passed_over)
    elif path.is_file():
        found, rejects = (file_entry(path.parent, path, None),), ()
    else:
        raise UserError(
            f"INPUT {source} does not exist: give a folder of videos, a .csv or .jsonl with a "
            "column 'path', a folder of shards, or one video."
        )
    files = sorted(map(_file_video, found), key=lambda video: video.key)
    listed = _checked(source, files, rejects, identity=str(path.resolve()))
    return replace(listed, passed_over=passed_over)


def _from_folder(
    root: Path, passed_over: Counter[str]
) -> tuple[tuple[Entry, ...], tuple[Reject, ...]]:
    paths = list(find_videos(root, passed_over))
    there = [path for path in paths if path.is_file()]
    broken = sorted(set(paths) - set(there))
    rejects = tuple(missing(path.relative_to(root).as_posix()) for path in broken)
    return tuple(file_entry(root, path, None) for path in there), rejects


def _file_video(entry: Entry) -> FileVideo:
    key = entry.source_path
    if entry.part is not None:
        key += f"_{entry.part[0]:.3f}_{entry.part[1]:.3f}"
    return FileVideo(
        key=key,
        path=entry.source_path,
        label=entry.label_name,
        file=entry.path,
        num_bytes=entry.path.stat().st_size,
        part=entry.part,
    )


def _from_shards(source: str) -> VideoList:
    shards = ShardSet(source)
    shards.check_sizes()
    labels = shards.manifest.labels
    videos = [
        ShardVideo(
            key=sample.key,
            path=f"{shard.name}/{sample.key}.{sample.suffix}",
            label=None if labels is None or sample.label is None else labels[sample.label],
            folder=source,
            shard=number,
            sample=sample,
        )
        for number, shard in enumerate(shards.manifest.shards)
        for sample in shards.index(number).samples
    ]
    videos.sort(key=lambda video: video.key)
    return _checked(source, videos, (), identity=f"shards {shards.hash}")


def _checked(
    source: str, videos: Sequence[Video], rejects: Sequence[Reject], *, identity: str
) -> VideoList:
    _require_some(source, videos, rejects)
    _require_once(source, videos)
    return VideoList(tuple(videos), tuple(rejects), identity)


def _require_some(source: str, videos: Sequence[Video], rejects: Sequence[Reject]) -> None:
    if not videos:
        named = f" ({len(rejects)} entries lead to no file)" if rejects else ""
        raise UserError(
            f"there are no videos in {source}{named}; in a folder they are known by their suffix: "
            f"{' '.join(sorted(VIDEO_SUFFIXES))}."
        )


def _require_once(source: str, videos: Sequence[Video]) -> None:
    key, count = Counter(video.key for video in videos).most_common(1)[0]
    if count > 1:
        raise UserError(f"{source} names '{key}' {count} times; leave it in once.")


@functools.lru_cache(maxsize=1)
def _shards(folder: str) -> ShardSet:
    return ShardSet(folder)


class _Member(io.RawIOBase):
    """One member of a shard as a file of its own."""

    def __init__(self, shards: ShardSet, shard: int, sample: IndexedSample) -> None:
        self._shards, self._shard, self._sample = shards, shard, sample
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._sample.bytes}
        self._position = max(0, base[whence] + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        size = max(0, min(len(view), self._sample.bytes - self._position))
        data = self._shards.read_bytes(self._shard, self._sample.offset + self._position, size)
        view[: len(data)] = data
        self._position += len(data)
        return len(data)
