"""The videos of an INPUT: a folder of videos, a list, shards, or one file."""

from __future__ import annotations

import contextlib
import io
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO

from arvideo_ds.decoding.video import Part, RejectedError
from arvideo_ds.errors import UserError
from arvideo_ds.shards.datasets.generic import read_csv, read_jsonl
from arvideo_ds.shards.datasets.listing import Entry, Listing, Source, file_entry, missing
from arvideo_ds.shards.ingest import open_source
from arvideo_ds.shards.manifest import MANIFEST, IndexedSample, Reject, ShardSet
from arvideo_ds.shards.video_files import VIDEO_SUFFIXES, find_videos

_LISTS = {".csv": read_csv, ".jsonl": read_jsonl}
_BLOCK = 2**20


@dataclass(frozen=True)
class Video:
    """A video of an input, or a part of one.

    path: below the input, or shard and member. key: the path with the part, or the key in the
    shard. open: gives a seekable file; errors: `RejectedError`.
    """

    key: str
    path: str
    label: str | None
    num_bytes: int
    open: Callable[[], AbstractContextManager[BinaryIO]]
    part: Part | None = None


@dataclass(frozen=True)
class VideoList:
    """Videos of an input, sorted by key, and rejects.

    identity: names the input and, for shards, their content. passed_over: number of files of a
    folder whose suffix is not a video's, by suffix.
    """

    videos: tuple[Video, ...]
    rejects: tuple[Reject, ...]
    identity: str
    passed_over: Mapping[str, int] = field(default_factory=dict)


def list_videos(
    source: str, *, videos: Path | None = None, skip_bad_rows: bool = False
) -> VideoList:
    """A folder (searched at any depth), a CSV or JSONL (column `path`), shards, or one video.

    videos: root of the paths of a list, by default the list's folder. skip_bad_rows: wrong rows are
    rejects. Errors: `UserError` without any video, and for a wrong row or a repeated video.
    """
    path = Path(source)
    if "://" in source or (path / MANIFEST).is_file():
        return _from_shards(source)
    if path.suffix.lower() in _LISTS and path.is_file():
        listing = _LISTS[path.suffix.lower()](
            Source(videos or path.parent, annotations=path, skip_bad_rows=skip_bad_rows)
        )
    elif path.is_dir():
        listing = _from_folder(path)
    elif path.is_file():
        listing = Listing((file_entry(path.parent, path, None),), None)
    else:
        raise UserError(
            f"INPUT {source} does not exist: give a folder of videos, a .csv or .jsonl with a "
            "column 'path', a folder of shards, or one video."
        )
    files = map(_file_video, listing.entries)
    return _video_list(source, files, str(path.resolve()), listing.rejects, listing.passed_over)


def _from_folder(root: Path) -> Listing:
    passed_over = Counter[str]()
    entries, rejects = [], []
    for path in find_videos(root, passed_over):
        if path.is_file():
            entries.append(file_entry(root, path, None))
        else:
            rejects.append(missing(path.relative_to(root).as_posix()))
    rejects.sort(key=lambda reject: Path(reject.source_path))
    return Listing(tuple(entries), None, tuple(rejects), passed_over=passed_over)


def _file_video(entry: Entry) -> Video:
    key = entry.source_path
    if entry.part is not None:
        key += f"_{entry.part[0]:.3f}_{entry.part[1]:.3f}"
    return Video(
        key=key,
        path=entry.source_path,
        label=entry.label_name,
        num_bytes=entry.path.stat().st_size,
        open=partial(open_source, entry.path),
        part=entry.part,
    )


def _from_shards(source: str) -> VideoList:
    shards = ShardSet(source)
    shards.check_sizes()
    labels = shards.manifest.labels
    videos = (
        Video(
            key=sample.key,
            path=f"{shard.name}/{sample.key}.{sample.suffix}",
            label=None if labels is None or sample.label is None else labels[sample.label],
            num_bytes=sample.bytes,
            open=partial(_open_member, source, number, sample),
        )
        for number, shard in enumerate(shards.manifest.shards)
        for sample in shards.index(number).samples
    )
    return _video_list(source, videos, f"shards {shards.hash}")


def _video_list(
    source: str,
    videos: Iterable[Video],
    identity: str,
    rejects: tuple[Reject, ...] = (),
    passed_over: Mapping[str, int] | None = None,
) -> VideoList:
    listed = sorted(videos, key=lambda video: video.key)
    if not listed:
        absent = f" ({len(rejects)} entries without a file)" if rejects else ""
        raise UserError(
            f"there are no videos in {source}{absent}; in a folder they are recognised by their "
            f"suffix: {' '.join(sorted(VIDEO_SUFFIXES))}."
        )
    key, count = Counter(video.key for video in listed).most_common(1)[0]
    if count > 1:
        raise UserError(f"{source} names '{key}' {count} times; keep one.")
    return VideoList(tuple(listed), rejects, identity, passed_over or {})


_open_shards = lru_cache(maxsize=1)(ShardSet)


@contextlib.contextmanager
def _open_member(folder: str, shard: int, sample: IndexedSample) -> Iterator[BinaryIO]:
    """A video in a shard: checked, never whole in memory."""
    member = _Member(_open_shards(folder), shard, sample)
    crc32 = 0
    while block := member.read(_BLOCK):
        crc32 = zlib.crc32(block, crc32)
    if crc32 != sample.crc32:
        raise RejectedError("altered", "its bytes in the shard are not those once written")
    member.seek(0)
    yield io.BufferedReader(member)


class _Member(io.RawIOBase):
    """One member of a shard as a file."""

    def __init__(self, shards: ShardSet, shard: int, sample: IndexedSample) -> None:
        self._shards, self._shard, self._sample = shards, shard, sample
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

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
