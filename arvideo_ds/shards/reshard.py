"""New shards from shards: merged, split, or a subset. The bytes of a video stay as they are.

Samples are chosen and dealt by key, seed and settings alone, so the same sources give the same
bytes, whatever folders they are in. Each video is compared with the SHA-256 in its facts on the
way: damage is never given a new hash that would vouch for it.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from tqdm import tqdm

from arvideo_ds.errors import UserError
from arvideo_ds.files.locks import lock
from arvideo_ds.randomness import split_generator
from arvideo_ds.shards import manifest as m
from arvideo_ds.shards.datasets import stored_rules
from arvideo_ds.shards.groups import Grouping, choose_groups
from arvideo_ds.shards.ingest import Sample
from arvideo_ds.shards.members import (
    DamagedError,
    Facts,
    Member,
    explained,
    located_facts,
    parse_facts,
)
from arvideo_ds.shards.writer import (
    assign_to_shards,
    facts_of_sets,
    label_numbers,
    write_manifest,
    write_missing,
)

# What a sample takes beside its video, roughly: facts, headers, its line of the index.
_OVERHEAD_BYTES = 4096
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Item:
    """One sample of a source: numbers of source and shard, its members, the label by name."""

    source: int
    shard: int
    video: m.IndexedSample
    facts: Member
    label_name: str | None
    names_by_set: dict[str, str] | None = None
    # Of the video, from its facts.
    sha256: str = ""
    # What it must not be separated from; None without --group_by.
    group: str | None = None

    @property
    def key(self) -> str:
        return self.video.key


@dataclass(frozen=True)
class Part:
    """A folder to write. labels: all names in the order of their numbers, also those unused."""

    folder: Path
    split: str | None
    labels: tuple[str, ...] | None
    items: tuple[Item, ...]
    rejects: tuple[m.Reject, ...] = ()
    label_sets: dict[str, tuple[str, ...]] | None = None
    # Where samples have groups.
    num_groups: int | None = None


@dataclass(frozen=True)
class Pool:
    """All samples of the sources, shuffled by the seed, and their labels united by name.

    The first source's labels keep their numbers; names that only later ones have follow.
    """

    sources: tuple[m.ShardSet, ...]
    items: tuple[Item, ...]
    labels: tuple[str, ...] | None
    seed: int
    # Those of samples with several labels, united likewise.
    label_sets: dict[str, tuple[str, ...]] | None = None


def open_pool(folders: Sequence[Path], seed: int, *, group_by: str | None = None) -> Pool:
    """The samples of all sources, with their groups (see `Grouping`) where these are given.

    Errors: `UserError` when a source is no folder of sound shards, two samples share a key, or the
    group of one cannot be determined.
    """
    sources = tuple(m.ShardSet(folder) for folder in folders)
    for source in sources:
        source.require_own()
    for shards in sources:
        shards.check_sizes()
    by_key: dict[str, Item] = {}
    grouping = None if group_by is None else Grouping(group_by)
    total = sum(shards.num_samples for shards in sources)
    for item, facts in tqdm(_items(sources), total=total, unit="video", desc="listing"):
        if other := by_key.get(item.key):
            raise UserError(_clash(sources, other, item))
        by_key[item.key] = item
        if grouping is not None:
            group = grouping.group_of(item.key, facts.model_dump(exclude_none=True))
            by_key[item.key] = replace(item, group=group)
    if grouping is not None:
        grouping.require_all()
    # By key, not by source: the order in which sources are named changes labels at most.
    keys = sorted(by_key)
    items = tuple(by_key[keys[place]] for place in split_generator(seed).permutation(len(keys)))
    sets = {name: _united(sources, name) for name in _names_of_sets(sources)}
    return Pool(sources, items, _united(sources, "") or None, seed, sets or None)


def notes(sources: Sequence[m.ShardSet]) -> Iterator[str]:
    """What a user should read before sources become one whose labels differ."""
    for which in ("", *_names_of_sets(sources)):
        united, what = _united(sources, which), f"label set '{which}'" if which else "labels"
        counts = {shards.name: len(_classes(shards, which)) for shards in sources}
        for shards in sources:
            if united and not counts[shards.name]:
                yield (
                    f"{shards.name} has no {what}: its {shards.num_samples:,} samples stay "
                    "without, and fine-tuning takes no loss on them"
                )
        if any(0 < count < len(united) for count in counts.values()):
            listed = ", ".join(f"{count:,} in {name}" for name, count in counts.items())
            yield f"{what}: {len(united):,} names together, {listed}"


def equal_videos(items: Sequence[Item]) -> Iterator[str]:
    """A note where one video has several keys."""
    keys: dict[str, list[str]] = defaultdict(list)
    for item in sorted(items, key=lambda item: item.key):
        keys[item.sha256].append(item.key)
    equal = [found for found in keys.values() if len(found) > 1]
    if equal:
        listed = "; ".join(" = ".join(found[:_SHOWN]) for found in equal[:_SHOWN])
        yield (
            f"{len(equal):,} {_videos(len(equal))} under several keys (the same SHA-256), such as "
            f"{listed}; a later split may put them on both sides (--group_by sha256 does not)"
        )


def equal_on_both_sides(parts: Sequence[Part]) -> Iterator[str]:
    """A note where a split has one video on both sides, under different keys."""
    first, second = ({item.sha256: item.key for item in part.items} for part in parts)
    if both := sorted(first.keys() & second.keys(), key=lambda digest: first[digest]):
        listed = "; ".join(f"{first[digest]} = {second[digest]}" for digest in both[:_SHOWN])
        names = [part.folder.name for part in parts]
        yield (
            f"{len(both):,} {_videos(len(both))} both in {names[0]} and in {names[1]} under "
            f"different keys (the same SHA-256), such as {listed}; --group_by sha256 keeps equal "
            "videos together"
        )


def _videos(count: int) -> str:
    return "video is" if count == 1 else "videos are"


def _names_of_sets(sources: Sequence[m.ShardSet]) -> list[str]:
    return list(
        dict.fromkeys(name for shards in sources for name in shards.manifest.label_sets or ())
    )


def _united(sources: Sequence[m.ShardSet], which: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for shards in sources for name in _classes(shards, which)))


def _classes(shards: m.ShardSet, which: str) -> tuple[str, ...]:
    """Names of a label set, or of the one label ('')."""
    sets = {"": shards.manifest.labels or (), **(shards.manifest.label_sets or {})}
    return sets.get(which, ())


def _items(sources: Sequence[m.ShardSet]) -> Iterator[tuple[Item, Facts]]:
    for number, shards in enumerate(sources):
        labels, sets = shards.manifest.labels or (), shards.manifest.label_sets or {}
        for shard, entry in enumerate(shards.manifest.shards):
            path = shards.folder / entry.name
            samples = shards.index(shard).samples
            for sample, member, facts in located_facts(path, samples):
                name = None if sample.label is None else labels[sample.label]
                names = _names(sample, sets)
                yield Item(number, shard, sample, member, name, names, facts.sha256), facts


def _names(sample: m.IndexedSample, sets: Mapping[str, Sequence[str]]) -> dict[str, str] | None:
    """The names of a sample's label in each set."""
    if sample.labels_by_set is None:
        return None
    return {name: sets[name][label] for name, label in sample.labels_by_set.items()}


def _clash(sources: Sequence[m.ShardSet], first: Item, second: Item) -> str:
    places = [
        f"{sources[item.source].folder} ({sources[item.source].manifest.shards[item.shard].name})"
        for item in (first, second)
    ]
    return (
        f"the key '{first.key}' is in {places[0]} and in {places[1]}: keys must stay unique. Name "
        "no source twice; where the videos are different ones, make one set of shards again with "
        "--videos a folder further up, so that its keys begin with another name."
    )


def merged(pool: Pool, folder: Path) -> Part:
    """Everything, with what the sources left out."""
    rejects = [reject for shards in pool.sources for reject in _rejects(shards)]
    return Part(folder, _split(pool), pool.labels, pool.items, tuple(rejects), pool.label_sets)


def _rejects(shards: m.ShardSet) -> Iterator[m.Reject]:
    path = shards.folder / m.REJECTS
    try:
        for line in path.read_bytes().splitlines():
            yield m.Reject.model_validate_json(line)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); copy it again.") from None
    except ValidationError:
        raise UserError(f"{path} has lines that are no rejects; copy it again.") from None


def split(pool: Pool, share: Fraction, folder: Path, names: tuple[str, str]) -> list[Part]:
    """Two folders below `folder`: `share` of the samples, and the rest.

    Of each label the first gets its share, give or take one sample. Both keep all labels, so a
    label has the same number in both. Where samples have groups, each is whole on one side, and the
    share is approximated. Errors: `UserError` when one would be empty.
    """
    in_first = _grouped(pool, share) if _has_groups(pool) else _by_label(pool, share)
    sides = [
        tuple(item for item in pool.items if (item.key in in_first) == first)
        for first in (True, False)
    ]
    groups = [{item.group for item in side} for side in sides]
    if not all(sides):
        among = ""
        if _has_groups(pool):
            count = len(groups[0] | groups[1])
            among = f" in {count:,} group" + "s" * (count > 1)
        raise UserError(
            f"--split_share {float(share):g} of {len(pool.items)} samples{among} leaves "
            f"'{names[0] if sides[1] else names[1]}' without any. Choose another share"
            + (", or other groups." if among else ".")
        )
    return [
        Part(
            folder / name,
            name,
            pool.labels,
            side,
            label_sets=pool.label_sets,
            num_groups=len(own) if _has_groups(pool) else None,
        )
        for name, side, own in zip(names, sides, groups, strict=True)
    ]


def _has_groups(pool: Pool) -> bool:
    return any(item.group is not None for item in pool.items)


def _grouped(pool: Pool, share: Fraction) -> set[str]:
    """Keys of the first side, whole groups of them."""
    members: dict[str, list[str | None]] = defaultdict(list)
    for item in pool.items:
        members[item.group or ""].append(item.label_name)
    chosen = choose_groups(members, share)
    return {item.key for item in pool.items if (item.group or "") in chosen}


def _by_label(pool: Pool, share: Fraction) -> set[str]:
    """Keys of the first side, the share of every label."""
    numbers: dict[str | None, int] = {None: -1}
    numbers.update((name, number) for number, name in enumerate(pool.labels or ()))
    by_label = sorted(pool.items, key=lambda item: numbers[item.label_name])
    # Counting on from label to label gives the share of each, and of the whole to the sample.
    return {
        item.key
        for place, item in enumerate(by_label)
        if int(share * (place + 1)) > int(share * place)
    }


def with_labels(pool: Pool, wanted: Sequence[str], folder: Path) -> Part:
    """The samples of these labels, which alone keep numbers, in the order of the old ones."""
    _require_known("--labels", wanted, pool.labels or (), "labels of the sources")
    chosen = set(wanted)
    labels = tuple(name for name in pool.labels or () if name in chosen)
    return _subset(pool, lambda item: item.label_name in chosen, folder, labels)


def with_keys(pool: Pool, wanted: Sequence[str], folder: Path) -> Part:
    """The samples of these keys. All labels stay."""
    _require_known("--keys", wanted, [item.key for item in pool.items], "keys of the sources")
    chosen = set(wanted)
    return _subset(pool, lambda item: item.key in chosen, folder, pool.labels)


def first_samples(pool: Pool, count: int, folder: Path) -> Part:
    """So many samples, drawn by the seed: a larger count holds those of a smaller one as well."""
    items = pool.items[:count]
    return Part(folder, _split(pool), pool.labels, items, label_sets=pool.label_sets)


def _subset(
    pool: Pool, wanted: Callable[[Item], bool], folder: Path, labels: tuple[str, ...] | None
) -> Part:
    items = tuple(item for item in pool.items if wanted(item))
    if not items:
        raise UserError("the sources have no sample of that kind; nothing was written.")
    return Part(folder, _split(pool), labels, items, label_sets=pool.label_sets)


def _require_known(option: str, wanted: Iterable[str], known: Iterable[str], what: str) -> None:
    names = list(known)
    unknown = sorted(set(wanted) - set(names))
    if unknown:
        more = f" and {len(unknown) - _SHOWN} more" * (len(unknown) > _SHOWN)
        raise UserError(
            f"{option}: {', '.join(map(repr, unknown[:_SHOWN]))}{more} not among the "
            f"{len(names)} {what}, such as {', '.join(map(repr, names[:_SHOWN])) or 'none'}."
        )


def write_part(pool: Pool, part: Part, *, how: str, samples_per_shard: int) -> m.Manifest:
    """Write what is missing of the part's shards, then its manifest.

    how: what was chosen, in words; kept in the manifest's settings. Errors: `UserError` when
    another process writes to the folder, or it has other shards, the disk is too small, or a
    source is damaged.
    """
    with lock(part.folder):
        return _write_part(pool, part, how, samples_per_shard)


def _write_part(pool: Pool, part: Part, how: str, samples_per_shard: int) -> m.Manifest:
    settings = _settings(pool, how, samples_per_shard)
    dataset = _joined(shards.manifest.dataset for shards in pool.sources) or ""
    indices, _ = write_missing(
        part.folder,
        assign_to_shards(dataset, part.split, part.items, samples_per_shard),
        _inputs_hash(part, settings),
        read=partial(_samples, pool, part),
        num_bytes=lambda item: item.video.bytes + _OVERHEAD_BYTES,
        title=part.folder.name,
    )
    return write_manifest(
        part.folder,
        indices,
        part.rejects,
        dataset=dataset,
        split=part.split,
        labels=part.labels,
        label_sets=part.label_sets,
        settings=settings,
    )


def _settings(pool: Pool, how: str, samples_per_shard: int) -> dict[str, str | int | None]:
    """What all sources were made with, and how these shards came from them."""
    first, *others = (shards.manifest.settings for shards in pool.sources)
    common = {
        name: value
        for name, value in first.items()
        if all(name in other and other[name] == value for other in others)
    }
    return {
        **common,
        **stored_rules(shards.manifest for shards in pool.sources),
        "samples_per_shard": samples_per_shard,
        "seed": pool.seed,
        "resharded": how,
        # The hashes of the manifests, which name data sets in checkpoints and results.
        "sources": " ".join(shards.hash for shards in pool.sources),
    }


def _inputs_hash(part: Part, settings: dict[str, str | int | None]) -> str:
    """Hash of all that decides the shards: settings, with the sources in them, and samples."""
    content = {
        "version": m.VERSION,
        "settings": settings,
        "split": part.split,
        "labels": part.labels,
        "samples": [item.key for item in part.items],
    }
    if part.label_sets is not None:
        content["label_sets"] = part.label_sets
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _samples(pool: Pool, part: Part, items: Iterable[Item]) -> Iterator[tuple[str, Sample]]:
    numbers = label_numbers(part.labels or ())
    of_sets = {name: label_numbers(classes) for name, classes in (part.label_sets or {}).items()}
    for item in items:
        video, facts = _read(pool.sources[item.source], item)
        facts["label"] = None if item.label_name is None else numbers[item.label_name]
        facts |= facts_of_sets(item.names_by_set, of_sets)
        yield item.key, Sample(video, item.video.suffix, facts)


def _read(shards: m.ShardSet, item: Item) -> tuple[bytes, dict[str, Any]]:
    """Video and facts of a sample, checked against each other and the index."""
    _, offset, size, _ = item.facts
    video = shards.read_bytes(item.shard, item.video.offset, item.video.bytes)
    text = shards.read_bytes(item.shard, offset, size)
    try:
        facts = parse_facts(text, item.video)
        if facts.label_name != item.label_name:
            message = f"its facts say label '{facts.label_name}', the index '{item.label_name}'"
            raise DamagedError(item.key, message)
        if hashlib.sha256(video).hexdigest() != facts.sha256:
            raise DamagedError(item.key, "its video was altered (another SHA-256 than its facts)")
    except DamagedError as error:
        path = shards.folder / shards.manifest.shards[item.shard].name
        raise explained(path, error) from None
    # Parsed anew: the order of the facts stays as it was.
    raw: dict[str, Any] = json.loads(text)
    return video, raw


def _split(pool: Pool) -> str | None:
    return _joined(shards.manifest.split for shards in pool.sources)


def _joined(names: Iterable[str | None]) -> str | None:
    """Different names as one, such as kinetics400+ssv2."""
    return m.JOINED_BY.join(dict.fromkeys(name for name in names if name)) or None
