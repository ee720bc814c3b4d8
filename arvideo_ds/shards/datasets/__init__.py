"""From what people have on disk to a list of entries: which video, which label.

One reader per data set, a function `Source -> Listing`. Readers check every row before any work
begins: a wrong row is named with file and line, a clip that the annotations name and the disk lacks
is reported, counts are compared with the published ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

from arvideo_ds.errors import UserError
from arvideo_ds.shards.datasets.ava import read_ava
from arvideo_ds.shards.datasets.diving48 import read_diving48
from arvideo_ds.shards.datasets.epic_kitchens import read_epic_kitchens
from arvideo_ds.shards.datasets.generic import read_csv, read_folder, read_jsonl
from arvideo_ds.shards.datasets.hmdb51 import read_hmdb51
from arvideo_ds.shards.datasets.kinetics import read_kinetics
from arvideo_ds.shards.datasets.listing import Entry, Listing, Source, safe_key
from arvideo_ds.shards.datasets.something_something import read_ssv2
from arvideo_ds.shards.datasets.ucf101 import read_ucf101
from arvideo_ds.shards.video_files import VIDEO_SUFFIXES, describe_passed_over

__all__ = ["READERS", "Entry", "Listing", "Source", "read_listing", "safe_key"]

READERS: dict[str, Callable[[Source], Listing]] = {
    "folder": read_folder,
    "csv": read_csv,
    "jsonl": read_jsonl,
    "kinetics400": read_kinetics(400),
    "kinetics600": read_kinetics(600),
    "kinetics700": read_kinetics(700),
    "ssv2": read_ssv2,
    "hmdb51": read_hmdb51,
    "ucf101": read_ucf101,
    "ava": read_ava,
    "diving48": read_diving48,
    "epic_kitchens": read_epic_kitchens,
}

_KINETICS = ("kinetics400", "kinetics600", "kinetics700")
# Options that only some data sets read; with the others they would change nothing, unsaid.
_ONLY_FOR = {
    "labels": ("folder", "csv", "jsonl", *_KINETICS, "ssv2", "diving48", "epic_kitchens"),
    "nouns": ("epic_kitchens",),
    "replacement": _KINETICS,
    "excluded": ("ava",),
    "first_second": ("ava",),
    "window_s": ("ava",),
    "keep_columns": ("csv", "jsonl"),
}


def read_listing(dataset: str, source: Source) -> Listing:
    """What a data set holds here, entries in a fixed order (by video id).

    Errors: `UserError` for missing folders, malformed rows, paths outside the videos folder,
    videos named twice, options that this data set does not read, or no video at all.
    """
    if not source.videos.is_dir():
        raise UserError(f"--videos {source.videos} is no folder.")
    _require_options_in_use(dataset, source)
    listing = READERS[dataset](source)
    entries = sorted(listing.entries, key=lambda entry: entry.video_id)
    if not entries:
        missing = ""
        if lost := listing.rejects:
            missing = f" ({len(lost)} rows name no file there, such as {lost[0].source_path})"
        raise UserError(
            f"no videos found for --dataset {dataset} below {source.videos}"
            + (f", split '{source.split}'" if source.split else "")
            + missing
            + (f"; {describe_passed_over(listing.passed_over)}" if listing.passed_over else "")
            + f"; files are known by their suffix: {' '.join(sorted(VIDEO_SUFFIXES))}."
        )
    for first, second in itertools.pairwise(entries):
        if first.video_id == second.video_id:
            raise UserError(
                f"two entries share the video id '{first.video_id}': {first.source_path} and "
                f"{second.source_path}. Ids are paths without suffix and must be unique."
            )
    return replace(listing, entries=tuple(entries))


def _require_options_in_use(dataset: str, source: Source) -> None:
    plain = Source(source.videos)
    for option, datasets in _ONLY_FOR.items():
        if dataset not in datasets and getattr(source, option) != getattr(plain, option):
            raise UserError(
                f"--dataset {dataset} does not read --{option}; leave it out. It is for "
                f"{', '.join(datasets)}."
            )
