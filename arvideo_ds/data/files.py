"""Which files are videos, by their names."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

VIDEO_SUFFIXES = frozenset(
    ".mp4 .webm .avi .mkv .mov .m4v .mpg .mpeg .ts .flv .wmv .3gp .ogv .m2ts".split()
)
# Folders that are looked into to see whether there are videos.
_LOOKED_INTO = 20


def is_video(name: str) -> bool:
    return Path(name).suffix.lower() in VIDEO_SUFFIXES


def find_videos(root: Path) -> Iterator[Path]:
    """Files with a video's suffix, at any depth, sorted within each folder."""
    for folder, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            if is_video(name):
                yield Path(folder, name)


def how_to_make_shards(folder: str) -> str:
    """The command, for errors. Videos and shards do not share a folder."""
    looked_into = itertools.islice(os.walk(folder), _LOOKED_INTO)
    holds_videos = any(is_video(name) for _, _, names in looked_into for name in names)
    command = "python data_tools/make_shards.py --dataset folder --videos"
    if holds_videos:
        return (
            f"It holds videos; make shards of them in another folder: {command} {folder} --output "
            "SHARDS; then give data.shards=SHARDS"
        )
    return f"Make them with: {command} VIDEOS --output {folder}"
