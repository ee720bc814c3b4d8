"""Readers of data sets: from the files on disk to a list of videos with labels.

A `Reader` is a function `Source -> Listing`, its options and rules for training. It checks every
row before any work begins: wrong rows are reported with file and line, missing clips are counted,
and counts are compared with the published ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

from arvideo_ds.errors import UserError
from arvideo_ds.registry import Registry
from arvideo_ds.shards.datasets.listing import (
    LABELS,
    Entry,
    Listing,
    Option,
    Reader,
    Source,
    VideoTree,
    safe_key,
)
from arvideo_ds.shards.manifest import JOINED_BY, Manifest
from arvideo_ds.shards.video_files import describe_passed_over

__all__ = [
    "LABELS",
    "READERS",
    "Entry",
    "Listing",
    "Option",
    "Reader",
    "Source",
    "VideoTree",
    "read_listing",
    "safe_key",
]

_BUILT_IN: dict[str, Reader | str] = {
    name: f"arvideo_ds.shards.datasets.{where}"
    for name, where in {
        "folder": "generic:FOLDER",
        "images": "generic:IMAGES",
        "csv": "generic:CSV",
        "jsonl": "generic:JSONL",
        "kinetics400": "kinetics:KINETICS400",
        "kinetics600": "kinetics:KINETICS600",
        "kinetics700": "kinetics:KINETICS700",
        "ssv2": "something_something:SSV2",
        "hmdb51": "hmdb51:HMDB51",
        "ucf101": "ucf101:UCF101",
        "ava": "ava:AVA",
        "diving48": "diving48:DIVING48",
        "epic_kitchens": "epic_kitchens:EPIC_KITCHENS",
    }.items()
}
READERS: Registry[Reader] = Registry("data set", _BUILT_IN)

# Rules for training on the labels of a data set.
_RULES: dict[str, Callable[[Reader], bool]] = {
    "never_flipped": lambda reader: not reader.flip,
    "sampled_uniformly": lambda reader: reader.sampling == "uniform",
}


def read_listing(dataset: str, source: Source) -> Listing:
    """Read a data set; entries are sorted by video id.

    Errors: `UserError` for missing folders, malformed rows, paths outside the videos folder,
    repeated videos, options of other data sets, or no video at all.
    """
    reader = READERS.choose(dataset, key="--dataset")
    if not source.videos.is_dir():
        missing = "is not a folder" if source.videos.exists() else "does not exist"
        raise UserError(f"--videos {source.videos} {missing}.")
    for option in source.options:
        if dataset not in (datasets := readers_of(option)):
            raise UserError(
                f"--dataset {dataset} does not read --{option}; remove it. It is for "
                f"{', '.join(datasets)}."
            )
    listing = reader.read(source)
    entries = sorted(listing.entries, key=lambda entry: entry.video_id)
    if not entries:
        where = f", split '{source.split}'" if source.split else ""
        if source.annotations and not (listing.rejects or listing.passed_over):
            raise UserError(f"--annotations {source.annotations} lists no videos{where}.")
        if rejects := listing.rejects:
            example = rejects[0].source_path
            where += f" ({len(rejects)} rows without a file there, such as {example})"
        if listing.passed_over:
            where += f"; {describe_passed_over(listing.passed_over)}"
        raise UserError(
            f"no files for --dataset {dataset} below {source.videos}{where}; files are "
            f"recognised by their suffix: {' '.join(sorted(reader.suffixes))}."
        )
    for left, right in itertools.pairwise(entries):
        if left.video_id == right.video_id:
            raise UserError(
                f"two entries share the video id '{left.video_id}': {left.source_path} and "
                f"{right.source_path}. Ids are paths without suffix and must be unique."
            )
    return replace(listing, entries=tuple(entries))


def readers_of(option: str) -> list[str]:
    """The data sets with an option."""
    return [
        name for name, reader in READERS.items() if option in {each.name for each in reader.options}
    ]


def _bound_by(rule: str, manifest: Manifest) -> set[str]:
    """The data sets of the shards with a rule."""
    stored = str(manifest.settings.get(rule) or "").split(JOINED_BY)
    registered = (name for name in manifest.datasets if name in READERS)
    return {name for name in registered if _RULES[rule](READERS[name])} | set(filter(None, stored))


# Labels tell left from right.
never_flipped = partial(_bound_by, "never_flipped")
# Labels need the whole video.
sampled_uniformly = partial(_bound_by, "sampled_uniformly")


def rules_to_store(dataset: str) -> dict[str, str]:
    """Rules of a plugin's data set for the manifest: training may run without the plugin.

    Built-in rules are not stored, so that shards keep their hashes.
    """
    if dataset in _BUILT_IN or dataset not in READERS:
        return {}
    return {rule: dataset for rule, applies in _RULES.items() if applies(READERS[dataset])}


def stored_rules(manifests: Iterable[Manifest]) -> dict[str, str]:
    """The rules in manifests, for the merged shards."""
    joined: dict[str, dict[str, None]] = {}
    for manifest in manifests:
        for rule in _RULES.keys() & manifest.settings.keys():
            joined.setdefault(rule, {})[str(manifest.settings[rule])] = None
    return {rule: JOINED_BY.join(names) for rule, names in sorted(joined.items())}
