"""New shards from shards: merged, split, or a subset. The bytes of a video stay as they are.

Keys, seed and settings alone choose the samples and assign them to shards: the same sources give
the same bytes in any folder. Each video is compared with the SHA-256 in its facts, so a damaged one
never gets a new, valid hash.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from arvideo_ds.errors import UserError
from arvideo_ds.files.locks import lock
from arvideo_ds.randomness import split_generator
from arvideo_ds.shards import manifest as m
from arvideo_ds.shards import members, writer
from arvideo_ds.shards.datasets import stored_rules
from arvideo_ds.shards.groups import Grouping, choose_groups
from arvideo_ds.shards.ingest import Sample
from arvideo_ds.shards.members import DamagedError, Facts, Member

# Rough size of a sample beside its video: facts, headers, its line of the index.
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
    # A split keeps samples of one group together; None without --group_by.
    group: str | None = None

    @property
    def key(self) -> str:
        return self.video.key


@dataclass(frozen=True)
class Part:
    """A folder to write. labels: all names in the order of their numbers, also unused ones."""

    folder: Path
    split: str | None
    labels: tuple[str, ...] | None
    items: tuple[Item, ...]
    rejects: tuple[m.Reject, ...] = ()
    label_sets: dict[str, tuple[str, ...]] | None = None

    @property
    def groups(self) -> list[str]:
        """Names of the groups of the items, sorted; none without --group_by."""
        return sorted({item.group for item in self.items if item.group is not None})


@dataclass(frozen=True)
class Pool:
    """All samples of the sources, shuffled by the seed, and their labels united by name.

    The first source's labels keep their numbers; new names of later sources follow.
    """

    sources: tuple[m.ShardSet, ...]
    items: tuple[Item, ...]
    labels: tuple[str, ...] | None
    seed: int
    label_sets: dict[str, tuple[str, ...]] | None = None

    @property
    def has_groups(self) -> bool:
        return any(item.group is not None for item in self.items)

    def part(self, folder: Path, items: Iterable[Item]) -> Part:
        """A folder of some of the samples, with all labels."""
        split = _joined(shards.manifest.split for shards in self.sources)
        return Part(folder, split, self.labels, tuple(items), label_sets=self.label_sets)


def open_pool(folders: Sequence[Path], seed: int, *, group_by: str | None = None) -> Pool:
    """The samples of all sources; group_by: see `Grouping`.

    Errors: `UserError` for a missing or damaged source, for a key in two sources, and for a sample
    whose group cannot be determined.
    """
    sources = tuple(m.ShardSet(folder) for folder in folders)
    for source in sources:
        source.require_own()
        source.check_sizes()
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
    # By key: the order of the sources changes only the labels.
    keys = sorted(by_key)
    items = tuple(by_key[keys[place]] for place in split_generator(seed).permutation(len(keys)))
    sets = _united_names(sources)
    return Pool(sources, items, sets.pop("") or None, seed, sets or None)


def notes(sources: Sequence[m.ShardSet]) -> Iterator[str]:
    """What a user should know before a merge of sources with different labels."""
    for which, united in _united_names(sources).items():
        what = f"label set '{which}'" if which else "labels"
        counts = {s.name: len(s.manifest.names_by_set.get(which, ())) for s in sources}
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
    """A note if a video has several keys."""
    keys: dict[str, list[str]] = defaultdict(list)
    for item in sorted(items, key=lambda item: item.key):
        keys[item.sha256].append(item.key)
    equal = [same for same in keys.values() if len(same) > 1]
    if equal:
        listed = "; ".join(" = ".join(same[:_SHOWN]) for same in equal[:_SHOWN])
        videos = "video is" if len(equal) == 1 else "videos are"
        yield (
            f"{len(equal):,} {videos} under several keys (the same SHA-256), such as "
            f"{listed}; a later split may put them on both sides (--group_by sha256 does not)"
        )


def equal_on_both_sides(parts: Sequence[Part]) -> Iterator[str]:
    """A note if a split has a video on both sides, under different keys."""
    first, second = ({item.sha256: item.key for item in part.items} for part in parts)
    if both := sorted(first.keys() & second.keys(), key=lambda digest: first[digest]):
        listed = "; ".join(f"{first[digest]} = {second[digest]}" for digest in both[:_SHOWN])
        places = " and in ".join(part.folder.name for part in parts)
        videos = "video is" if len(both) == 1 else "videos are"
        yield (
            f"{len(both):,} {videos} both in {places} under different keys (the same SHA-256), "
            f"such as {listed}; --group_by sha256 keeps equal videos together"
        )


def _united_names(sources: Sequence[m.ShardSet]) -> dict[str, tuple[str, ...]]:
    """Class names of all sources by label set; the only label is the set ''."""
    united: dict[str, dict[str, None]] = {}
    for shards in sources:
        for which, names in shards.manifest.names_by_set.items():
            united.setdefault(which, {}).update(dict.fromkeys(names))
    return {which: tuple(names) for which, names in united.items()}


def _items(sources: Sequence[m.ShardSet]) -> Iterator[tuple[Item, Facts]]:
    for number, shards in enumerate(sources):
        names = shards.manifest.names_by_set
        for shard, entry in enumerate(shards.manifest.shards):
            path = shards.folder / entry.name
            samples = shards.index(shard).samples
            for sample, member, facts in members.located_facts(path, samples):
                label = None if sample.label is None else names[""][sample.label]
                by_set = (sample.labels_by_set or {}).items()
                labels = {which: names[which][n] for which, n in by_set} or None
                yield Item(number, shard, sample, member, label, labels, facts.sha256), facts


def _clash(sources: Sequence[m.ShardSet], first: Item, second: Item) -> str:
    places = [
        f"{sources[item.source].folder} ({sources[item.source].manifest.shards[item.shard].name})"
        for item in (first, second)
    ]
    return (
        f"the key '{first.key}' is in {places[0]} and in {places[1]}: keys must stay unique. Give "
        "each source once; if the videos differ, make one set of shards again with --videos a "
        "folder further up, so that its keys begin with another name."
    )


def merged(pool: Pool, folder: Path) -> Part:
    """All samples and rejects of the sources."""
    rejects = [reject for shards in pool.sources for reject in m.read_rejects(shards.folder)]
    return replace(pool.part(folder, pool.items), rejects=tuple(rejects))


def split(pool: Pool, share: Fraction, folder: Path, names: tuple[str, str]) -> list[Part]:
    """Two folders below `folder`: `share` of the samples, and the rest.

    The first gets its share of each label, to within one sample. Both keep all labels, so a label
    has the same number in both. Groups stay whole, which makes the share approximate. Errors:
    `UserError` if one side would be empty.
    """
    in_first = _by_group(pool, share) if pool.has_groups else _by_label(pool, share)
    sides = [
        [item for item in pool.items if (item.key in in_first) == one] for one in (True, False)
    ]
    groups = [{item.group for item in side} for side in sides]
    if not all(sides):
        count = len(groups[0] | groups[1])
        among = f" in {count:,} group" + "s" * (count > 1) if pool.has_groups else ""
        raise UserError(
            f"--split_share {float(share):g} of {len(pool.items)} samples{among} leaves "
            f"'{names[0] if sides[1] else names[1]}' without any. Choose another share"
            + (", or other groups." if among else ".")
        )
    return [
        replace(pool.part(folder / name, side), split=name)
        for name, side in zip(names, sides, strict=True)
    ]


def _by_group(pool: Pool, share: Fraction) -> set[str]:
    """Keys of the first side: whole groups."""
    labels: dict[str, list[str | None]] = defaultdict(list)
    for item in pool.items:
        labels[item.group or ""].append(item.label_name)
    chosen = choose_groups(labels, share)
    return {item.key for item in pool.items if (item.group or "") in chosen}


def _by_label(pool: Pool, share: Fraction) -> set[str]:
    """Keys of the first side: the share of every label."""
    numbers: dict[str | None, int] = {None: -1, **writer.label_numbers(pool.labels or ())}
    by_label = sorted(pool.items, key=lambda item: numbers[item.label_name])
    # One count over all labels gives the exact share of the whole, and nearly that of each.
    return {
        item.key
        for place, item in enumerate(by_label)
        if int(share * (place + 1)) > int(share * place)
    }


def with_labels(pool: Pool, names: Sequence[str], folder: Path) -> Part:
    """The samples of these labels. Only these keep numbers, in their former order."""
    _require_known("--labels", names, pool.labels or (), "labels of the sources")
    chosen = set(names)
    part = _subset(pool, lambda item: item.label_name in chosen, folder)
    return replace(part, labels=tuple(name for name in pool.labels or () if name in chosen))


def with_keys(pool: Pool, keys: Sequence[str], folder: Path) -> Part:
    """The samples of these keys. All labels stay."""
    _require_known("--keys", keys, [item.key for item in pool.items], "keys of the sources")
    chosen = set(keys)
    return _subset(pool, lambda item: item.key in chosen, folder)


def first_samples(pool: Pool, count: int, folder: Path) -> Part:
    """`count` samples chosen by the seed; a larger count adds to those of a smaller one."""
    return pool.part(folder, pool.items[:count])


def _subset(pool: Pool, is_chosen: Callable[[Item], bool], folder: Path) -> Part:
    part = pool.part(folder, filter(is_chosen, pool.items))
    if not part.items:
        raise UserError("the sources have no such sample; nothing was written.")
    return part


def _require_known(option: str, names: Iterable[str], known: Sequence[str], what: str) -> None:
    unknown = sorted(set(names) - set(known))
    if unknown:
        more = f" and {len(unknown) - _SHOWN} more" * (len(unknown) > _SHOWN)
        raise UserError(
            f"{option}: {', '.join(map(repr, unknown[:_SHOWN]))}{more} not among the "
            f"{len(known)} {what}, such as {', '.join(map(repr, known[:_SHOWN])) or 'none'}."
        )


def write_part(pool: Pool, part: Part, *, how: str, samples_per_shard: int) -> m.Manifest:
    """Write the missing shards of a part, then its manifest.

    how: the choice in words, for the manifest's settings. Errors: `UserError` if another process
    writes to the folder, the folder has other shards, the disk is too small, or a source is
    damaged.
    """
    settings = _settings(pool, how, samples_per_shard)
    dataset = _joined(shards.manifest.dataset for shards in pool.sources) or ""
    with lock(part.folder):
        indices, _ = writer.write_missing(
            part.folder,
            "-".join(filter(None, (dataset, part.split))),
            part.items,
            samples_per_shard,
            _inputs_hash(part, settings),
            read=partial(_samples, pool, part),
            num_bytes=lambda item: item.video.bytes + _OVERHEAD_BYTES,
            title=part.folder.name,
        )
        return writer.write_manifest(
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
    """The settings that all sources share, and how these shards were made from them."""
    first, *others = (shards.manifest.settings for shards in pool.sources)
    common = dict(item for item in first.items() if all(item in o.items() for o in others))
    return {
        **common,
        **stored_rules(shards.manifest for shards in pool.sources),
        "samples_per_shard": samples_per_shard,
        "seed": pool.seed,
        "resharded": how,
        # Hashes of the manifests, which identify data sets in checkpoints and results.
        "sources": " ".join(shards.hash for shards in pool.sources),
    }


def _inputs_hash(part: Part, settings: dict[str, str | int | None]) -> str:
    """Hash of all that determines the shards: settings, which name the sources, and samples."""
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
    label_facts = writer.LabelFacts(part.labels, part.label_sets)
    for item in items:
        video, facts = _read(pool.sources[item.source], item)
        facts |= label_facts(item.label_name, item.names_by_set)
        yield item.key, Sample(video, item.video.suffix, facts)


def _read(shards: m.ShardSet, item: Item) -> tuple[bytes, dict[str, Any]]:
    """Video and facts of a sample, checked against each other and the index."""
    video = shards.read_bytes(item.shard, item.video.offset, item.video.bytes)
    text = shards.read_bytes(item.shard, item.facts.offset, item.facts.bytes)
    try:
        facts = members.parse_facts(text, item.video)
        if facts.label_name != item.label_name:
            message = f"its facts say label '{facts.label_name}', the index '{item.label_name}'"
            raise DamagedError(item.key, message)
        if hashlib.sha256(video).hexdigest() != facts.sha256:
            raise DamagedError(item.key, "its video was altered (another SHA-256 than its facts)")
    except DamagedError as error:
        path = shards.folder / shards.manifest.shards[item.shard].name
        raise members.explained(path, error) from None
    return video, json.loads(text)  # the facts in their order


def _joined(names: Iterable[str | None]) -> str | None:
    """Different names as one, such as kinetics400+ssv2."""
    return m.JOINED_BY.join(dict.fromkeys(name for name in names if name)) or None
