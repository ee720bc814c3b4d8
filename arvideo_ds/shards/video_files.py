"""Video files by their suffix, counts of other files, and reads at an offset."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

# Without .gif (mostly pictures) and raw streams such as .h264 (without times, and without a length
# that would show a cut file), although they decode. A CSV may name them.
VIDEO_SUFFIXES = frozenset(
    """.mp4 .webm .avi .mkv .mov .m4v .mpg .mpeg .ts .flv .wmv .3gp .ogv .m2ts
    .mts .vob .mxf .asf .f4v .3g2 .qt .divx""".split()
)
IMAGE_SUFFIXES = frozenset(".jpg .jpeg .png .webp .bmp".split())
# Annotations and files of the operating system, which are not counted.
_EXPECTED_SUFFIXES = frozenset(
    ".csv .tsv .txt .json .jsonl .xml .yaml .yml .md .pbtxt .pkl .ini".split()
)
# Folders searched for videos before an error.
_SEARCHED = 20


def read_at(descriptor: int, size: int, offset: int) -> bytes:
    """Bytes of an open file from `offset` on, fewer where it ends before. Errors: `OSError`."""
    # One pread returns at most 2 GiB.
    parts, left = [], size
    while left and (part := os.pread(descriptor, left, offset + size - left)):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def is_video(name: str, suffixes: frozenset[str] = VIDEO_SUFFIXES) -> bool:
    # macOS writes the attributes of x.mp4 to ._x.mp4 on other file systems.
    return not name.startswith("._") and Path(name).suffix.lower() in suffixes


def find_videos(
    root: Path,
    passed_over: Counter[str] | None = None,
    suffixes: frozenset[str] = VIDEO_SUFFIXES,
) -> Iterator[Path]:
    """Files with a suffix of `suffixes`, at any depth, sorted within each folder.

    passed_over: counts the suffixes of other files, except annotations and hidden files.
    """
    for folder, folders, names in os.walk(root):
        folders.sort()
        hidden = any(part.startswith(".") for part in Path(folder).relative_to(root).parts)
        for name in sorted(names):
            if is_video(name, suffixes):
                yield Path(folder, name)
                continue
            suffix, lower = Path(name).suffix.lower(), name.lower()
            expected = hidden or lower.startswith(".") or lower == "thumbs.db"
            if passed_over is not None and not expected and suffix not in _EXPECTED_SUFFIXES:
                passed_over[suffix or "no suffix"] += 1


def count_videos(what: str, count: int, passed_over: Mapping[str, int]) -> str:
    """Such as 'my_videos: 12 videos', with a note of the files passed over."""
    note = f"\nnote: {describe_passed_over(passed_over)}" if passed_over else ""
    return f"{what}: {count:,} videos{note}"


def describe_passed_over(passed_over: Mapping[str, int]) -> str:
    """Such as '3 files passed over (by their suffix): .gif 2, .h264 1'."""
    total = sum(passed_over.values())
    listed = ", ".join(f"{suffix} {n:,}" for suffix, n in Counter(passed_over).most_common())
    return f"{total:,} files passed over (by their suffix): {listed}"


def how_to_make_shards(folder: str) -> str:
    """The command, for errors. Videos and shards need different folders."""
    searched = itertools.islice(os.walk(folder), _SEARCHED)
    command = "arvideo shards --dataset folder --videos"
    if any(is_video(name) for _, _, names in searched for name in names):
        return (
            f"It has videos; make shards of them in another folder: {command} {folder} --output "
            "SHARDS; then give data.shards=SHARDS"
        )
    return f"Make them with: {command} VIDEOS --output {folder}"
