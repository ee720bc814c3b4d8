"""From what people have on disk to a list of entries: which video, which label.

One `Reader` per data set: a function `Source -> Listing`, its options and what training must obey.
Readers check every row before any work begins: a wrong row is named with file and line, a clip that
the annotations name and the disk lacks is reported, counts are compared with the published ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace

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
from arvideo_ds.shards.video_files import VIDEO_SUFFIXES, describe_passed_over

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

# What the labels of a data set may forbid while training.
_RULES: dict[str, Callable[[Reader], bool]] = {
    "never_flipped": lambda reader: not reader.flip,
    "sampled_uniformly": lambda reader: reader.sampling == "uniform",
}


def read_listing(dataset: str, source: Source) -> Listing:
    """What a data set holds here, entries in a fixed order (by video id).

    Errors: `UserError` for missing folders, malformed rows, paths outside the videos folder,
    videos named twice, options that this data set does not read, or no video at all.
    """
    reader = READERS.choose(dataset, key="--dataset")
    if not source.videos.is_dir():
        raise UserError(f"--videos {source.videos} is no folder.")
    _require_options_in_use(dataset, source)
    listing = reader.read(source)
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


def readers_of(option: str) -> list[str]:
    """The data sets that read an option."""
    return [
        name for name, reader in READERS.items() if option in {each.name for each in reader.options}
    ]


def _require_options_in_use(dataset: str, source: Source) -> None:
    for option in source.options:
        if dataset not in (datasets := readers_of(option)):
            raise UserError(
                f"--dataset {dataset} does not read --{option}; leave it out. It is for "
                f"{', '.join(datasets)}."
            )


def never_flipped(manifest: Manifest) -> set[str]:
    """The data sets in some shards whose labels tell left from right."""
    return _bound_by("never_flipped", manifest)


def sampled_uniformly(manifest: Manifest) -> set[str]:
    """The data sets in some shards whose labels need the whole video."""
    return _bound_by("sampled_uniformly", manifest)


def _bound_by(rule: str, manifest: Manifest) -> set[str]:
    stored = str(manifest.settings.get(rule) or "").split(JOINED_BY)
    known = (name for name in manifest.datasets if name in READERS)
    return {name for name in known if _RULES[rule](READERS[name])} | set(filter(None, stored))


def rules_to_store(dataset: str) -> dict[str, str]:
    """What the manifest keeps of the rules of a plugin's data set, which training may not load.

    Those of built-in ones are known by their names: their shards keep their hashes.
    """
    if dataset in _BUILT_IN or dataset not in READERS:
        return {}
    return {rule: dataset for rule, holds in _RULES.items() if holds(READERS[dataset])}


def stored_rules(manifests: Iterable[Manifest]) -> dict[str, str]:
    """The rules that manifests keep, for shards merged from theirs."""
    joined: dict[str, dict[str, None]] = {}
    for manifest in manifests:
        for rule in _RULES.keys() & manifest.settings.keys():
            joined.setdefault(rule, {})[str(manifest.settings[rule])] = None
    return {rule: JOINED_BY.join(names) for rule, names in sorted(joined.items())}
