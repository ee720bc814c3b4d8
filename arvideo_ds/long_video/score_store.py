"""Scores of every token of a shard set, on disk: how much each is worth predicting.

<folder>/                           SHARDS/scores/NAME by default
  shard-000012.safetensors          of every video of shard 12: <key>.scores  t h w, float16
                                    and, of a tokenizer,        <key>.codes   t h w, int32
  scores.json                       what decided them, hash of every file; written last

A video is its frames 0, stride, 2 stride, ..., fitted to the grid of tokens (transforms.py) and cut
into windows of 16 that touch. t h w is the grid of the whole video, so h or w may be larger than a
clip's. Videos that do not decode have no entry, but a reason. Every file names what decided its
scores and the CRC-32 of its entries, so it is known of each video whether the pass has to score it.
"""

from __future__ import annotations

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
from arvideo_ds.geometry import Triple
from arvideo_ds.shards.manifest import AlteredError, ShardSet, each_in_threads
from arvideo_ds.shards.store import open_store

VERSION = 1
SCORES = "scores.json"
# Sampled frames of a window; windows touch.
WINDOW = 16
# One key: safetensors writes several in no fixed order.
_HEADER = "token_scores"
_OPEN_FILES = 64


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ScoreSpec(_Record):
    """All that decides the scores of a shard set."""

    version: int = VERSION
    # Hash of the shards' manifest.
    manifest: str
    scorer: str
    settings: dict[str, Any]
    # Hash of the tokenizer's weights, and levels of its codes, where there is one.
    tokenizer: str | None = None
    levels: tuple[int, ...] | None = None
    # Sampled frames from one window to the next, and in one.
    hop: int = WINDOW
    window: int = WINDOW
    stride: int
    size: tuple[int, int]
    patch: Triple

    def times(self, num_frames: int) -> int:
        """Times of a video's grid: those that hold one of its sampled frames."""
        return -(-num_frames // (self.stride * self.patch[0]))


class ScoreFile(_Record):
    """One shard's scores."""

    # A file directly in the folder: nothing outside of it is ever opened.
    name: str = Field(pattern=r"^[^/\\\x00]+\.safetensors$")
    bytes: int
    sha256: str
    videos: int


class ScoreContents(_Record):
    """Contents of scores.json."""

    spec: ScoreSpec
    files: tuple[ScoreFile, ...]
    # Videos without scores: key -> why.
    unreadable: dict[str, str]

    @property
    def num_videos(self) -> int:
        return sum(file.videos for file in self.files)


class ShardHeader(_Record):
    """What a shard's file says of itself."""

    spec: ScoreSpec
    crc32: dict[str, int]
    unreadable: dict[str, str]


@dataclass(frozen=True)
class VideoScores:
    """Scores t h w (float16) of a video or a part of it and, where there are, codes t h w."""

    scores: np.ndarray
    codes: np.ndarray | None = None

    def over(self, first: int, times: int) -> VideoScores:
        """From time `first` on.

        Beyond the video, where its last frame stands still, its last codes are repeated, and
        nothing is worth more than the least of its tokens.
        """
        places, last = first + np.arange(times), len(self.scores) - 1
        part = self._map(lambda values: values[np.minimum(places, last)])
        part.scores[places > last] = self.scores.min()
        return part

    def within(self, row: int, column: int, height: int, width: int) -> VideoScores:
        """A box of tokens."""
        return self._map(lambda values: values[:, row : row + height, column : column + width])

    def flat(self) -> tuple[np.ndarray, np.ndarray | None]:
        """N float32 and N int64, along (time, row, column)."""
        scores = self.scores.astype(np.float32).ravel()
        return scores, None if self.codes is None else self.codes.astype(np.int64).ravel()

    def _map(self, change: Any) -> VideoScores:
        return VideoScores(change(self.scores), None if self.codes is None else change(self.codes))


class TokenScores:
    """A finished folder of scores (or its URL), read by (shard, key), in any process.

    Errors: `UserError` where there is none or it is not finished.
    """

    def __init__(self, folder: str | Path) -> None:
        self.name, store = str(folder), open_store(folder)
        try:
            text = store.newest(SCORES).read_bytes()
        except FileNotFoundError:
            raise UserError(
                f"there are no finished token scores in {folder} (no {SCORES}). Make them, or go "
                "on making them: python scripts/score_tokens.py --shards SHARDS --scorer NAME "
                f"--output {folder}"
            ) from None
        except OSError as error:
            raise UserError(f"cannot read {folder}/{SCORES}: {error}.") from None
        self.contents = parse_contents(text, self.name)
        self.spec = self.contents.spec
        # Identifies the scores in checkpoints: every file's hash is in it.
        self.hash = hashlib.sha256(text).hexdigest()
        self._store = store.of(self.hash)

    def require(self, shards: ShardSet, recipe: Recipe) -> None:
        """Errors: `UserError` where the scores are of other shards or other tokens, or altered."""
        if self.spec.manifest != shards.hash:
            raise UserError(
                f"data.scores={self.name} are scores of other shards than {shards.name}: manifest "
                f"{self.spec.manifest[:12]} there, {shards.hash[:12]} here. Point data.shards at "
                "those, or score these: python scripts/score_tokens.py --shards "
                f"{shards.name} --scorer {self.spec.scorer}."
            )
        asked = {
            "data.stride": (self.spec.stride, recipe.data.stride),
            "data.size": (self.spec.size, recipe.data.size),
            "model.patch": (self.spec.patch, recipe.patch),
        }
        wrong = [
            f"{key} is {_said(there)} there and {_said(here)} in the recipe"
            for key, (there, here) in asked.items()
            if there != here
        ]
        if wrong:
            raise UserError(
                f"data.scores={self.name} are scores of other tokens: {'; '.join(wrong)}. Set the "
                "recipe to the store's values, or score the shards with --recipe."
            )
        if len(self.contents.files) != len(shards.manifest.shards):
            raise UserError(
                f"{self.name}/{SCORES} names {len(self.contents.files)} files for "
                f"{len(shards.manifest.shards)} shards. Delete it and run score_tokens.py again, "
                "which keeps the files that are whole."
            )

    def check_sizes(self) -> None:
        """Compare every file's size with scores.json, before any work begins."""
        files = self.contents.files
        each_in_threads(
            lambda number: self._require_size(files[number]), len(files), f"sizes in {self.name}"
        )

    def read(self, shard: int, key: str) -> VideoScores | None:
        """Scores of one video; None where it was not readable when the shards were scored.

        Errors: `AlteredError` where they are not those once written.
        """
        if key in self.contents.unreadable:
            return None
        file, header = self._open(shard)
        return read_video(file, header, key, self._where(shard))

    def nothing(self, grid: Triple) -> VideoScores:
        """What stands for the scores of a clip that did not decode."""
        codes = None if self.spec.levels is None else np.zeros(grid, np.int32)
        return VideoScores(np.zeros(grid, np.float16), codes)

    @functools.lru_cache(maxsize=_OPEN_FILES)  # noqa: B019  lives as long as its reader
    def _open(self, shard: int) -> tuple[Any, ShardHeader]:
        file = self.contents.files[shard]
        try:
            return open_file(self._store.path(file.name, file.bytes))
        except (OSError, AlteredError) as error:
            raise AlteredError(f"{self._where(shard)}: {error}") from None

    def _require_size(self, file: ScoreFile) -> None:
        try:
            size = self._store.size(file.name)
        except OSError as error:
            raise UserError(f"cannot open {self.name}/{file.name}: {error}.") from None
        if size not in (None, file.bytes):  # not every server says a size
            raise UserError(
                f"{self.name}/{file.name} has {size} bytes, {SCORES} says {file.bytes}: it was "
                "truncated or altered. Copy it again, or run score_tokens.py again, which makes "
                "it anew."
            )

    def _where(self, shard: int) -> str:
        return f"{self.name}/{self.contents.files[shard].name}"


def open_scores(shards: ShardSet, recipe: Recipe) -> TokenScores | None:
    """The scores of data.scores. Errors: `UserError` where they are not of these clips' tokens."""
    if recipe.data.scores is None:
        return None
    scores = TokenScores(recipe.data.scores)
    scores.require(shards, recipe)
    return scores


def hash_of_scores(recipe: Recipe) -> str | None:
    """What identifies the scores of data.scores. Errors: as `TokenScores`."""
    return None if recipe.data.scores is None else TokenScores(recipe.data.scores).hash


def file_name(shard: int) -> str:
    return f"shard-{shard:06d}.safetensors"


def parse_contents(text: bytes, name: str) -> ScoreContents:
    """Errors: `UserError` where it is no scores.json that this version reads."""
    try:
        contents = ScoreContents.model_validate_json(text)
        if contents.spec.version == VERSION:
            return contents
        why = f"it has version {contents.spec.version}, this program reads {VERSION}"
    except ValidationError as error:
        why = error.errors()[0]["msg"]
    raise UserError(
        f"{name}/{SCORES} cannot be read ({why}). Delete it and run score_tokens.py again, which "
        "keeps the files that are whole."
    )


def file_bytes(spec: ScoreSpec, videos: Mapping[str, VideoScores | str]) -> bytes:
    """A shard's file from the scores of its videos, or why they have none.

    Equal content gives equal bytes.
    """
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
    """A shard's file, open, and its header. Errors: `AlteredError`; `OSError` where it is not."""
    with path.open("rb"):  # a missing file is said so by Python, not by safetensors
        pass
    try:
        file = safe_open(path, framework="numpy")
        return file, ShardHeader.model_validate_json((file.metadata() or {}).get(_HEADER, ""))
    except (SafetensorError, ValidationError) as error:
        why = str(error).partition("\n")[0]
        raise AlteredError(f"{path.name} is no whole file of scores ({why})") from None


def read_video(file: Any, header: ShardHeader, key: str, where: str) -> VideoScores:
    """One video's entries. Errors: `AlteredError` where they are not those once written."""
    names = [f"{key}.scores", *([f"{key}.codes"] if header.spec.levels is not None else [])]
    found = []
    for name in names:
        values = _entry(file, name)
        if values is None or zlib.crc32(values.data) != header.crc32.get(name):
            raise AlteredError(
                f"{name} in {where} is not what was once written; run score_tokens.py again, which "
                "makes that file anew"
            )
        found.append(values)
    return VideoScores(*found)


def _entry(file: Any, name: str) -> np.ndarray | None:
    try:
        return np.ascontiguousarray(file.get_tensor(name))
    except SafetensorError:
        return None


def stored(
    path: Path, spec: ScoreSpec, keys: Sequence[str]
) -> Iterator[tuple[str, VideoScores | str]]:
    """Those of these videos that a shard's file holds intact: the scores, or why there are none.

    Errors: `UserError` where it holds scores of another spec.
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
        try:
            video = read_video(file, header, key, path.name)
        except AlteredError:
            continue
        yield key, video


def require_same(before: ScoreSpec, now: ScoreSpec, folder: str) -> None:
    """Errors: `UserError` that says in what two specs differ."""
    was, is_now = before.model_dump(mode="json"), now.model_dump(mode="json")
    changed = [key for key in is_now if was[key] != is_now[key]]
    if changed:
        listed = "; ".join(
            f"{_NAMES.get(key, key)} was {_said(was[key])}, is {_said(is_now[key])}"
            for key in changed
        )
        raise UserError(
            f"{folder} holds scores of other things ({listed}). Choose another --output, or score "
            "with what it was begun with."
        )


def contents_of(folder: Path, spec: ScoreSpec, shards: ShardSet) -> ScoreContents:
    """What scores.json is to say of the files, all of which are there."""
    files, unreadable = [], {}
    for shard, entry in enumerate(shards.manifest.shards):
        path = folder / file_name(shard)
        data = path.read_bytes()
        _, header = open_file(path)
        unreadable.update(header.unreadable)
        files.append(
            ScoreFile(
                name=path.name,
                bytes=len(data),
                sha256=hashlib.sha256(data).hexdigest(),
                videos=entry.samples - len(header.unreadable),
            )
        )
    return ScoreContents(spec=spec, files=tuple(files), unreadable=unreadable)


_NAMES = {"manifest": "the shards' manifest", "tokenizer": "the tokenizer"}


def _said(value: Any) -> str:
    """A value for people; of a hash the beginning."""
    if isinstance(value, str) and len(value) == hashlib.sha256().digest_size * 2:
        return value[:12]
    return json.dumps(value)
