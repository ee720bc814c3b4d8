"""The scoring pass: shards -> windows -> scores of every token, one file a shard.

Rank r of R scores every R-th shard from r on; no rank talks to another. A shard's file is written
once all its videos are through, to a temporary name, synced, renamed; those that are there and
whole are kept, so the same command goes on. Rank 0 waits for all files and writes scores.json.
What a file holds is a function of its shard and the spec alone, so neither ranks, workers nor
interruptions change a byte (on one kind of machine).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from arvideo_ds.data.clips import decoded
from arvideo_ds.data.decoders import DecodeError
from arvideo_ds.data.manifest import ShardSet, dump_json
from arvideo_ds.data.sampling import window_frames
from arvideo_ds.data.shard_writer import explained_when_full, write_atomically
from arvideo_ds.data.streams import Failed, Finished, stream_all
from arvideo_ds.data.token_scores import (
    SCORES,
    WINDOW,
    ScoreContents,
    ScoreSpec,
    VideoScores,
    contents_of,
    file_bytes,
    file_name,
    is_whole,
    parse_contents,
    require_same,
)
from arvideo_ds.data.transforms import fit_to_grid
from arvideo_ds.data.video import RejectedError
from arvideo_ds.evaluation.token_scorers import Piece, Scored, Scorer

# Windows that are decoded and scored together: what a process holds at once.
_WINDOWS_AT_ONCE = 8
_POLL_S, _SAY_EVERY_S = 1.0, 60.0

# A video: number of its shard, place in it.
Task = tuple[int, int]


@dataclass(frozen=True)
class ScoringJob:
    """What `score_shards` is to do. timeout_s: longest time for some windows of one video."""

    shards: ShardSet
    scorer: Scorer
    spec: ScoreSpec
    output: Path
    decoder: str
    workers: int = 0
    timeout_s: float = 120.0
    rank: int = 0
    num_ranks: int = 1

    def path(self, shard: int) -> Path:
        return self.output / file_name(shard)

    def keys(self, shard: int) -> list[str]:
        return [sample.key for sample in self.shards.index(shard).samples]

    def is_done(self, shard: int) -> bool:
        """Errors: `UserError` where the file there is of another spec."""
        return is_whole(self.path(shard), self.spec, self.keys(shard))


@dataclass(frozen=True)
class ScoringReport:
    """What one rank did. contents: of scores.json, where this rank wrote it."""

    new_videos: int
    new_files: int
    interrupted: bool
    contents: ScoreContents | None


def make_spec(
    shards: ShardSet,
    scorer: Scorer,
    *,
    stride: int,
    size: tuple[int, int],
    patch: tuple[int, int, int],
) -> ScoreSpec:
    """All that decides the scores of these shards."""
    return ScoreSpec(
        manifest=shards.hash,
        scorer=scorer.name,
        settings=scorer.settings,
        tokenizer=scorer.tokenizer,
        levels=scorer.levels,
        stride=stride,
        size=size,
        patch=patch,
    )


def score_shards(job: ScoringJob, *, stop: Callable[[], bool] = lambda: False) -> ScoringReport:
    """Write this rank's files that are not there yet and, on rank 0, scores.json.

    stop: once true, the videos under way are finished and no other is begun; the shard they are of
    is scored anew. Errors: `UserError` where the folder holds scores of another spec, or its disk
    is full.
    """
    job.output.mkdir(parents=True, exist_ok=True)
    if (job.output / SCORES).exists():
        before = parse_contents((job.output / SCORES).read_bytes(), str(job.output))
        require_same(before.spec, job.spec, str(job.output))
    own = range(job.rank, len(job.shards.manifest.shards), job.num_ranks)
    missing = [shard for shard in own if not job.is_done(shard)]
    with explained_when_full(job.output):
        new_videos, new_files = _score(job, missing, stop)
        contents = None
        if job.rank == 0 and new_files == len(missing) and _all_there(job, stop):
            contents = contents_of(job.output, job.spec, job.shards)
            write_atomically(job.output / SCORES, dump_json(contents))
    interrupted = new_files < len(missing) or (job.rank == 0 and contents is None)
    return ScoringReport(new_videos, new_files, interrupted, contents)


def read_pieces(job: ScoringJob, task: Task) -> Iterator[Piece]:
    """The windows of a video, some at a time. Errors: `RejectedError` where it does not decode."""
    shard, member = task
    sample = job.shards.index(shard).samples[member]
    windows = window_frames(sample.num_frames, job.spec.stride, WINDOW)
    for first in range(0, len(windows), _WINDOWS_AT_ONCE):
        wanted = windows[first : first + _WINDOWS_AT_ONCE]
        try:
            frames = decoded(job.shards, job.decoder, shard, sample, wanted.ravel())
        except DecodeError as error:
            raise RejectedError(error.kind, error.message) from None
        fitted = fit_to_grid(frames, job.spec.size, job.spec.patch[1:])
        yield Piece(sample.key, first, fitted.reshape(*wanted.shape, *fitted.shape[1:]))


def _score(job: ScoringJob, missing: list[int], stop: Callable[[], bool]) -> tuple[int, int]:
    """How many videos and files were made."""
    open_shards = {shard: _OpenShard(job, shard) for shard in missing}
    tasks = [(shard, member) for shard in missing for member in range(len(job.keys(shard)))]
    for opened in open_shards.values():
        if opened.complete:  # no video at all
            opened.write()
    videos, files = 0, sum(opened.complete for opened in open_shards.values())
    with tqdm(
        desc="scores", unit="video", total=len(tasks), miniters=0, disable=job.rank > 0
    ) as bar:
        for (shard, member), item in _scored(job, tasks, stop):
            opened = open_shards[shard]
            if isinstance(item, Scored):
                opened.append(member, item)
                bar.update(0)
                continue
            opened.end(member, item)
            videos += 1
            bar.update()
            if opened.complete:
                opened.write()
                files += 1
                del open_shards[shard]
    return videos, files


def _scored(
    job: ScoringJob, tasks: list[Task], stop: Callable[[], bool]
) -> Iterable[tuple[Task, Scored | Finished | Failed]]:
    items = stream_all(
        functools.partial(_work, job),
        tasks,
        workers=min(job.workers, len(tasks)),
        timeout_s=job.timeout_s,
        stop=stop,
    )
    for task, item in items:
        yield task, job.scorer(item) if isinstance(item, Piece) else item


def _work(job: ScoringJob, task: Task) -> Iterator[Piece | Scored]:
    """What a decoding process does with a video: all of it, unless the scorer has a device."""
    for piece in read_pieces(job, task):
        yield piece if job.scorer.on_device else job.scorer(piece)


@dataclass
class _OpenShard:
    """The scores of one shard on their way into its file."""

    job: ScoringJob
    shard: int
    parts: dict[int, list[Scored]] = field(default_factory=dict)
    videos: dict[str, VideoScores] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        samples = self.job.shards.manifest.shards[self.shard].samples
        return len(self.videos) + len(self.unreadable) == samples

    def append(self, member: int, scored: Scored) -> None:
        self.parts.setdefault(member, []).append(scored)

    def end(self, member: int, how: Finished | Failed) -> None:
        """A video is through: it has scores, or a reason why not."""
        sample = self.job.shards.index(self.shard).samples[member]
        parts = self.parts.pop(member, [])
        if isinstance(how, Finished):
            video = _joined(parts, self.job.spec.times(sample.num_frames))
            if np.isfinite(video.scores).all():
                self.videos[sample.key] = video
                return
            how = Failed("not_finite", "a score is no finite number")
        self.unreadable[sample.key] = f"{how.reason} ({how.message})"
        tqdm.write(f"without scores: {sample.key!r}: {self.unreadable[sample.key]}")

    def write(self) -> None:
        data = file_bytes(self.job.spec, self.videos, self.unreadable)
        write_atomically(self.job.path(self.shard), data)


def _joined(parts: list[Scored], times: int) -> VideoScores:
    """The windows of a video in a row, without the times after its end."""
    with np.errstate(over="ignore"):  # said by `end`
        scores = _row([part.scores for part in parts], times).astype(np.float16)
    codes: list[Any] = [part.codes for part in parts]
    return VideoScores(scores, None if codes[0] is None else _row(codes, times).astype(np.int32))


def _row(parts: list[np.ndarray], times: int) -> np.ndarray:
    windows = np.concatenate(parts)
    return windows.reshape(-1, *windows.shape[2:])[:times]


def _all_there(job: ScoringJob, stop: Callable[[], bool]) -> bool:
    """Wait until every rank has written its files; False where it is to stop before."""
    missing = list(range(len(job.shards.manifest.shards)))
    said = time.monotonic()
    while missing := [shard for shard in missing if not job.is_done(shard)]:
        if stop():
            return False
        if time.monotonic() - said > _SAY_EVERY_S:
            said = time.monotonic()
            late = missing[0]
            print(
                f"waiting for {len(missing)} file(s) of other ranks, such as {file_name(late)} of "
                f"rank {late % job.num_ranks}",
                flush=True,
            )
        time.sleep(_POLL_S)
    return True
