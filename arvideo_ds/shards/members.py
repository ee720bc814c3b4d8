"""The members of a shard's tar, and the facts in its json members.

For tools that check, show or rearrange shards; training reads videos by the index.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from arvideo_ds.errors import UserError
from arvideo_ds.shards.manifest import IndexedSample
from arvideo_ds.shards.video_files import read_at

FACTS_SUFFIX = "json"
NO_FACTS = "has no facts in the tar"


class Member(NamedTuple):
    """A member of a tar, with offset and size of its content."""

    name: str
    offset: int
    bytes: int
    is_file: bool


class Facts(BaseModel):
    """The facts of every video; data sets add others."""

    model_config = ConfigDict(extra="allow", frozen=True)

    video_id: str
    source_path: str
    label: int | None
    label_name: str | None
    # By label set, where there are several.
    labels_by_set: dict[str, int] | None = None
    names_by_set: dict[str, str] | None = None
    num_frames: int
    fps: float
    width: int
    height: int
    duration_s: float
    codec: str
    # Number of packets of the source file in which the decoder reported errors.
    decoder_errors: int = 0
    bytes: int
    sha256: str


class DamagedError(Exception):
    """A shard that differs from its index. key: of the sample, where one is damaged."""

    def __init__(self, key: str | None, message: str) -> None:
        super().__init__(key, message)
        self.key, self.message = key, message


def read_members(path: Path) -> Iterator[Member]:
    """The members in the order of the file.

    Errors: `DamagedError`, after the readable members, where it is not a complete tar.
    """
    try:
        # "r:" reads only uncompressed tars, which have offsets.
        with tarfile.open(path, "r:") as tar:
            for t in tar:
                yield Member(t.name, t.offset_data, t.size, t.isfile())
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DamagedError(None, f"is not a complete tar ({error})") from None


def facts_members(members: Iterable[Member]) -> dict[str, Member]:
    """Key -> its json member."""
    suffix = "." + FACTS_SUFFIX
    return {m.name.removesuffix(suffix): m for m in members if m.name.endswith(suffix)}


def parse_facts(text: bytes, sample: IndexedSample) -> Facts:
    """The facts of one sample, from its json member.

    Errors: `DamagedError` for invalid facts, or facts that differ from the index.
    """
    try:
        facts = Facts.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the start"
        raise DamagedError(sample.key, f"its facts are wrong at {where} ({first['msg']})") from None
    for name in ("num_frames", "label", "labels_by_set", "bytes"):
        value, indexed = getattr(facts, name), getattr(sample, name)
        if value != indexed:
            raise DamagedError(sample.key, f"its facts have {name} {value}, the index {indexed}")
    return facts


def read_facts(path: Path, samples: Sequence[IndexedSample]) -> list[Facts]:
    """The facts of a shard's samples, in their order. Errors: as `located_facts`."""
    return [facts for _, _, facts in located_facts(path, samples)]


def located_facts(
    path: Path, samples: Sequence[IndexedSample]
) -> Iterator[tuple[IndexedSample, Member, Facts]]:
    """Each sample of a shard with its json member and facts.

    Errors: `UserError` with shard and key, where the shard is damaged.
    """
    try:
        places = facts_members(read_members(path))
        with path.open("rb") as file:
            for sample in samples:
                text = read_member(file, places, sample.key)
                yield sample, places[sample.key], parse_facts(text, sample)
    except DamagedError as error:
        raise explained(path, error) from None


def read_member(file: BinaryIO, places: dict[str, Member], key: str) -> bytes:
    """The content of the key's member. Errors: `DamagedError` without one."""
    if key not in places:
        raise DamagedError(key, NO_FACTS)
    return read_at(file.fileno(), places[key].bytes, places[key].offset)


def explained(path: Path, error: DamagedError) -> UserError:
    """The error for the user."""
    where = f"{path}, {error.key}" if error.key else str(path)
    return UserError(
        f"{where}: {error.message}. arvideo verify {path.parent} lists all "
        "damage; copy the shard again, or delete it and rerun make_shards."
    )
