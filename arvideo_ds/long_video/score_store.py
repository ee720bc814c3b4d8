"""Scores of every token of a shard set, on disk: how much each is worth predicting.

<folder>/                           SHARDS/scores/NAME by default
  shard-000012.safetensors          for every video of shard 12: <key>.scores  t h w, float16
                                    with a tokenizer also        <key>.codes   t h w, int32
  scores.json                       the `ScoreSpec`, the hash of every file; written last

A video's frames 0, stride, 2 stride, ... are fitted to the grid of tokens (data/transforms.py) and
cut into consecutive windows of 16. t h w is the grid of the whole video, so h or w may be larger
than a clip's. Videos that do not decode have a reason instead of an entry. Every file contains its
spec and the CRC-32 of each entry, so that the pass knows which videos are missing.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from arvideo_ds.config import Recipe
from arvideo_ds.errors import UserError
from arvideo_ds.files.checksums import sha256_of
from arvideo_ds.geometry import Triple
from arvideo_ds.shards.manifest import AlteredError, ShardSet, each_in_threads
from arvideo_ds.shards.store import open_store

VERSION = 1
SCORES = "scores.json"
# Sampled frames of a window.
WINDOW = 16
# One key: safetensors writes several in no fixed order.
_HEADER = "token_scores"
_OPEN_FILES = 64
_REBUILD = "Delete it and run `arvideo score_tokens` again, which keeps the intact files."


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ScoreSpec(_Record):
    """Everything that determines the scores of a shard set."""

    version: int = VERSION
    # Hash of the shards' manifest.
    manifest: str
    scorer: str
    settings: dict[str, Any]
    # Hash of the tokenizer's weights, and levels of its codes.
    tokenizer: str | None = None
    levels: tuple[int, ...] | None = None
    # Sampled frames from one window to the next, and in a window.
    hop: int = WINDOW
    window: int = WINDOW
    stride: int
    size: tuple[int, int]
    patch: Triple

    def times(self, num_frames: int) -> int:
        """Times of a video's grid."""
        return -(-num_frames // (self.stride * self.patch[0]))


class ScoreFile(_Record):
    """One shard's scores."""

    # Directly in the folder: no other file is ever opened.
    name: str = Field(pattern=r"^[^/\\\x00]+\.safetensors$")
    bytes: int
    sha256: str
    videos: int


class ScoreContents(_Record):
    """Contents of scores.json."""

    spec: ScoreSpec
    files: tuple[ScoreFile, ...]
    # Videos without scores: key -> reason.
    unreadable: dict[str, str]

    @property
    def num_videos(self) -> int:
        return sum(file.videos for file in self.files)


class ShardHeader(_Record):
    """Metadata in a shard's file."""

    spec: ScoreSpec
    crc32: dict[str, int]
    unreadable: dict[str, str]


@dataclass(frozen=True)
class VideoScores:
    """Scores t h w (float16) of a video or a part of it, and codes t h w with a tokenizer."""

    scores: np.ndarray
    codes: np.ndarray | None = None

    def over(self, first: int, times: int) -> VideoScores:
        """`times` times from `first` on.

        After the end of the video, where a clip repeats the last frame, codes are repeated and
        scores are the video's lowest.
        """
        indices, last = first + np.arange(times), len(self.scores) - 1
        part = self._map(lambda values: values[np.minimum(indices, last)])
        part.scores[indices > last] = self.scores.min()
        return part

    def within(self, row: int, column: int, height: int, width: int) -> VideoScores:
        """A box of tokens."""
        return self._map(lambda values: values[:, row : row + height, column : column + width])

    def flat(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Scores N float32 and codes N int64, along (time, row, column)."""
        scores = self.scores.astype(np.float32).ravel()
        return scores, None if self.codes is None else self.codes.astype(np.int64).ravel()

    def _map(self, change: Any) -> VideoScores:
        return VideoScores(change(self.scores), None if self.codes is None else change(self.codes))


class TokenScores:
    """A finished folder of scores (or its URL), read by (shard, key), in any process.

    Errors: `UserError` where the folder is missing or not finished.
    """

    def __init__(self, folder: str | Path) -> None:
        self.name, store = str(folder), open_store(folder)
        try:
            text = store.newest(SCORES).read_bytes()
        except FileNotFoundError:
            raise UserError(
                f"there are no finished token scores in {folder} (no {SCORES}). Compute or "
                "complete them: arvideo score_tokens --shards SHARDS --scorer NAME --output "
                f"{folder}"
            ) from None
        except OSError as error:
            raise UserError(f"cannot read {folder}/{SCORES}: {error}.") from None
        self.contents = parse_contents(text, self.name)
        self.spec = self.contents.spec
        # Identifies the scores in checkpoints; it covers every file's hash.
        self.hash = hashlib.sha256(text).hexdigest()
        self._store = store.of(self.hash)

    def require(self, shards: ShardSet, recipe: Recipe) -> None:
        """Errors: `UserError` where the scores are of other shards or tokens, or altered."""
        if self.spec.manifest != shards.hash:
            raise UserError(
                f"data.scores={self.name} are scores of other shards than {shards.name}: manifest "
                f"{self.spec.manifest[:12]} there, {shards.hash[:12]} here. Change data.shards, or "
                f"run arvideo score_tokens --shards {shards.name} --scorer {self.spec.scorer}."
            )
        values = {
            "data.stride": (self.spec.stride, recipe.data.stride),
            "data.size": (self.spec.size, recipe.data.size),
            "model.patch": (self.spec.patch, recipe.patch),
        }
        wrong = [
            f"{key} is {_shown(there)} there and {_shown(here)} in the recipe"
            for key, (there, here) in values.items()
            if there != here
        ]
        if wrong:
            raise UserError(
                f"data.scores={self.name} are scores of other tokens: {'; '.join(wrong)}. Set the "
                "recipe to the store's values, or score the shards with --recipe."
            )
        if len(self.contents.files) != len(shards.manifest.shards):
            raise UserError(
                f"{self.name}/{SCORES} lists {len(self.contents.files)} files for "
                f"{len(shards.manifest.shards)} shards. {_REBUILD}"
            )

    def check_sizes(self) -> None:
        """Compare the size of every file with scores.json."""
        each_in_threads(self._require_size, len(self.contents.files), f"sizes in {self.name}")

    def read(self, shard: int, key: str) -> VideoScores | None:
        """Scores of one video; None if it has none. Errors: `AlteredError` where they changed."""
        if key in self.contents.unreadable:
            return None
        file, header = self._open(shard)
        return read_video(file, header, key, self._where(shard))

    def nothing(self, grid: Triple) -> VideoScores:
        """Zeros, for a clip that did not decode."""
        codes = None if self.spec.levels is None else np.zeros(grid, np.int32)
        return VideoScores(np.zeros(grid, np.float16), codes)

    @functools.lru_cache(maxsize=_OPEN_FILES)  # noqa: B019  lives as long as its reader
    def _open(self, shard: int) -> tuple[Any, ShardHeader]:
        file = self.contents.files[shard]
        try:
            return open_file(self._store.path(file.name, file.bytes))
        except (OSError, AlteredError) as error:
            raise AlteredError(f"{self._where(shard)}: {error}") from None

    def _require_size(self, shard: int) -> None:
        file = self.contents.files[shard]
        try:
            size = self._store.size(file.name)
        except OSError as error:
            raise UserError(f"cannot open {self._where(shard)}: {error}.") from None
        if size not in (None, file.bytes):  # not every server reports a size
            raise UserError(
                f"{self._where(shard)} has {size} bytes instead of {file.bytes}: it was truncated "
                "or altered. Copy it again, or run `arvideo score_tokens` again, which rewrites it."
            )

    def _where(self, shard: int) -> str:
        return f"{self.name}/{self.contents.files[shard].name}"


def open_scores(shards: ShardSet, recipe: Recipe) -> TokenScores | None:
    """The scores of data.scores. Errors: `UserError`, as `TokenScores` and its `require`."""
    if recipe.data.scores is None:
        return None
    scores = TokenScores(recipe.data.scores)
    scores.require(shards, recipe)
    return scores


def hash_of_scores(recipe: Recipe) -> str | None:
    """The hash of data.scores. Errors: as `TokenScores`."""
    return None if recipe.data.scores is None else TokenScores(recipe.data.scores).hash


def file_name(shard: int) -> str:
    return f"shard-{shard:06d}.safetensors"


def parse_contents(text: bytes, name: str) -> ScoreContents:
    """Parse scores.json. Errors: `UserError` where it is damaged or of another version."""
    try:
        contents = ScoreContents.model_validate_json(text)
        if contents.spec.version == VERSION:
            return contents
        why = f"it has version {contents.spec.version}, this program reads {VERSION}"
    except ValidationError as error:
        why = error.errors()[0]["msg"]
    raise UserError(f"{name}/{SCORES} cannot be read ({why}). {_REBUILD}")


def file_bytes(spec: ScoreSpec, videos: Mapping[str, VideoScores | str]) -> bytes:
    """A shard's file, with each video's scores or the reason for none; deterministic."""
    entries, unreadable = {}, {}
    for key, video in sorted(videos.items()):
        if isinstance(video, str):
            unreadable[key] = video
            continue
        entries[f"{key}.scores"] = video.scores
        if video.codes is not None:
            entries[f"{key}.codes"] = video.codes
    entries = {name: np.ascontiguousarray(entries[name]) for name in sorted(entries)}
    crc32 = {name: zlib.crc32(values.data) for name, values in entries.items()}
    header = ShardHeader(spec=spec, crc32=crc32, unreadable=unreadable)
    return save(entries, metadata={_HEADER: json.dumps(header.model_dump(mode="json"))})


def open_file(path: Path) -> tuple[Any, ShardHeader]:
    """A shard's open file and its header. Errors: `AlteredError`; `OSError` if it is missing."""
    path.open("rb").close()  # the operating system's errors are clearer than safetensors'
    try:
        file = safe_open(path, framework="numpy")
        return file, ShardHeader.model_validate_json((file.metadata() or {}).get(_HEADER, ""))
    except (SafetensorError, ValidationError) as error:
        why = str(error).partition("\n")[0]
        raise AlteredError(f"{path.name} is damaged ({why})") from None


def read_video(file: Any, header: ShardHeader, key: str, where: str) -> VideoScores:
    """The entries of one video. Errors: `AlteredError` where they changed."""
    names = [f"{key}.scores", *([f"{key}.codes"] if header.spec.levels is not None else [])]
    entries = []
    for name in names:
        try:
            values = np.ascontiguousarray(file.get_tensor(name))
        except SafetensorError:
            values = None
        if values is None or zlib.crc32(values.data) != header.crc32.get(name):
            raise AlteredError(
                f"{name} in {where} was altered; run `arvideo score_tokens` again, which rewrites "
                "that file"
            )
        entries.append(values)
    return VideoScores(*entries)


def stored(
    path: Path, spec: ScoreSpec, keys: Sequence[str]
) -> Iterator[tuple[str, VideoScores | str]]:
    """The videos with an intact entry in a shard's file: scores, or the reason for none.

    Errors: `UserError` where the file is of another spec.
    """
    try:
        file, header = open_file(path)
    except (OSError, AlteredError):
        return
    require_same(header.spec, spec, str(path.parent))
    for key in keys:
        if key in header.unreadable:
            yield key, header.unreadable[key]
            continue
        with contextlib.suppress(AlteredError):
            yield key, read_video(file, header, key, path.name)


def require_same(before: ScoreSpec, now: ScoreSpec, folder: str) -> None:
    """Errors: `UserError` with the differences between two specs."""
    was, is_now = before.model_dump(mode="json"), now.model_dump(mode="json")
    changed = [key for key in is_now if was[key] != is_now[key]]
    if changed:
        listed = "; ".join(
            f"{_NAMES.get(key, key)} was {_shown(was[key])}, is {_shown(is_now[key])}"
            for key in changed
        )
        raise UserError(
            f"{folder} has scores of other settings ({listed}). Choose another --output, or use "
            "its settings."
        )


def contents_of(folder: Path, spec: ScoreSpec, shards: ShardSet) -> ScoreContents:
    """The contents of scores.json; every shard must have its file."""
    files, unreadable = [], {}
    for shard, entry in enumerate(shards.manifest.shards):
        path = folder / file_name(shard)
        _, header = open_file(path)
        unreadable.update(header.unreadable)
        files.append(
            ScoreFile(
                name=path.name,
                bytes=path.stat().st_size,
                sha256=sha256_of(path),
                videos=entry.samples - len(header.unreadable),
            )
        )
    return ScoreContents(spec=spec, files=tuple(files), unreadable=unreadable)


_NAMES = {"manifest": "the shards' manifest", "tokenizer": "the tokenizer"}


def _shown(value: Any) -> str:
    """A value in messages: the first digits of a hash, else JSON."""
    if isinstance(value, str) and len(value) == hashlib.sha256().digest_size * 2:
        return value[:12]
    return json.dumps(value)
