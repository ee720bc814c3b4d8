"""The scoring pass: shards -> windows -> scores of every token, one file a shard.

Rank r of R scores every R-th shard from r on; no rank talks to another or waits for it. A shard's
file is written once all its videos are through, or where the pass ends before, to a temporary name,
synced, renamed; videos that stand in a file are kept, so the same command goes on. The rank that
ends last, and so finds all files there, writes scores.json.

What a file holds at last is a function of its shard and the spec alone, so neither ranks, workers
nor interruptions change a byte (on one kind of machine). A video without scores has a reason that
is true of the video: it does not decode, or a score is no finite number. That one hung or died says
nothing of the kind: it is tried once more, and then the next pass tries it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from arvideo_ds.data.sampling import window_frames
from arvideo_ds.data.transforms import fit_to_grid
from arvideo_ds.decoding.decoders import DecodeError, decode
from arvideo_ds.decoding.streams import Failed, Finished, stream_all
from arvideo_ds.decoding.video import RejectedError
from arvideo_ds.files.atomic import write_bytes
from arvideo_ds.long_video.score_store import (
    SCORES,
    WINDOW,
    ScoreContents,
    ScoreSpec,
    VideoScores,
    contents_of,
    file_bytes,
    file_name,
    parse_contents,
    require_same,
    stored,
)
from arvideo_ds.long_video.scorers import Piece, Scored, Scorer
from arvideo_ds.shards.manifest import ShardSet, dump_json
from arvideo_ds.shards.writer import explained_when_full

# Frames that are decoded together, at the video's own size. Decoders hold them about twice.
_DECODED_BYTES = 128 * 2**20

# A video: number of its shard, place in it.
Task = tuple[int, int]


@dataclass(frozen=True)
class ScoringJob:
    """What `score_shards` is to do.

    timeout_s: longest time from one window of a video to the next. leave_out_failed: videos that
    hung or died twice are recorded as those that do not decode.
    """

    shards: ShardSet
    scorer: Scorer
    spec: ScoreSpec
    output: Path
    decoder: str
    workers: int = 0
    timeout_s: float = 120.0
    rank: int = 0
    num_ranks: int = 1
    leave_out_failed: bool = False

    def path(self, shard: int) -> Path:
        return self.output / file_name(shard)

    def keys(self, shard: int) -> list[str]:
        return [sample.key for sample in self.shards.index(shard).samples]

    def lacking(self, shard: int) -> list[str]:
        """The videos that its file does not hold.

        Errors: `UserError` where that is of another spec.
        """
        keys = self.keys(shard)
        there = {key for key, _ in stored(self.path(shard), self.spec, keys)}
        return [key for key in keys if key not in there]


@dataclass(frozen=True)
class ScoringReport:
    """What one rank did.

    failed: videos that hung or died twice, and how. lacking: where this rank was the last one, the
    videos of all ranks that have no scores yet; contents: of scores.json, where it has all.
    """

    new_videos: int
    new_files: int
    interrupted: bool
    failed: dict[str, str]
    lacking: list[str]
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
    """Write this rank's files that are not there yet and, once all ranks' are, scores.json.

    stop: once true, the videos under way are finished and no other is begun. Errors: `UserError`
    where the folder holds scores of another spec, or its disk is full.
    """
    job.output.mkdir(parents=True, exist_ok=True)
    if (job.output / SCORES).exists():
        before = parse_contents((job.output / SCORES).read_bytes(), str(job.output))
        require_same(before.spec, job.spec, str(job.output))
    own = range(job.rank, len(job.shards.manifest.shards), job.num_ranks)
    missing = [shard for shard in own if job.lacking(shard) or not job.path(shard).exists()]
    with explained_when_full(job.output):
        shards = _score(job, missing, stop)
        lacking, contents = ([], None) if shards.interrupted else _finish(job, bool(missing))
    return ScoringReport(
        new_videos=shards.num_videos,
        new_files=shards.num_files,
        interrupted=shards.interrupted,
        failed=shards.failed,
        lacking=lacking,
        contents=contents,
    )


def read_windows(job: ScoringJob, task: Task) -> Iterator[Piece]:
    """The windows of a video, one by one.

    Decoded at once are as many as `_DECODED_BYTES` hold at the video's own size, which the first
    one shows, and one at least. Errors: `RejectedError` where it does not decode; `AlteredError`
    where the shard does not hold it any more, and `MemoryError`, which say nothing of the video.
    """
    shard, member = task
    sample = job.shards.index(shard).samples[member]
    windows = window_frames(sample.num_frames, job.spec.stride, WINDOW)
    video = job.shards.read(shard, sample)
    first, count = 0, 1
    while first < len(windows):
        wanted = windows[first : first + count]
        frames = _decoded(job, video, wanted.ravel())
        for number, window in enumerate(np.split(frames, len(wanted)), first):
            fitted = fit_to_grid(window, job.spec.size, job.spec.patch[1:])
            yield Piece(sample.key, number, fitted[None])
        first, count = first + count, max(1, _DECODED_BYTES // window.nbytes)


def _decoded(job: ScoringJob, video: bytes, wanted: np.ndarray) -> np.ndarray:
    try:
        return decode(job.decoder, video, wanted)
    except DecodeError as error:
        if error.kind.endswith("MemoryError"):  # NumPy and PyAV have their own
            raise MemoryError(error.message) from None
        raise RejectedError(error.kind, error.message) from None


def _score(job: ScoringJob, missing: list[int], stop: Callable[[], bool]) -> _OpenShards:
    """Score what the files of these shards lack, and write them."""
    shards = _OpenShards(job, missing)
    with tqdm(
        desc="scores", unit="video", total=len(shards.tasks()), miniters=0, disable=job.rank > 0
    ) as bar:
        _work_off(job, shards, bar, stop)
        # The machine may have been busy: once more, after all others.
        shards.reopen_failed()
        if not stop():  # no processes are started for nothing
            _work_off(job, shards, bar, stop)
    if job.leave_out_failed:
        shards.leave_out_failed()
    shards.write()
    return shards


def _work_off(job: ScoringJob, shards: _OpenShards, bar: tqdm, stop: Callable[[], bool]) -> None:
    tasks = shards.tasks()
    items = stream_all(
        functools.partial(_work, job),
        tasks,
        workers=min(job.workers, len(tasks)),
        timeout_s=job.timeout_s,
        stop=stop,
    )
    for task, item in items:
        shards.take(task, job.scorer(item) if isinstance(item, Piece) else item)
        bar.update(shards.num_videos - bar.n)


def _work(job: ScoringJob, task: Task) -> Iterator[Piece | Scored]:
    """What a decoding process does with a video: all of it, unless the scorer has a device."""
    for piece in read_windows(job, task):
        yield piece if job.scorer.on_device else job.scorer(piece)


class _OpenShards:
    """The shards of this rank whose files are not there or lack videos.

    num_videos, num_files: videos that came to an end, and files that were made whole.
    """

    def __init__(self, job: ScoringJob, missing: list[int]) -> None:
        self.num_videos = self.num_files = 0
        self._open = {shard: _OpenShard(job, shard) for shard in missing}

    @property
    def interrupted(self) -> bool:
        return bool(self.tasks())

    @property
    def failed(self) -> dict[str, str]:
        """Videos that hung or died, by key, and how."""
        return {key: why for opened in self._open.values() for key, why in opened.failed.items()}

    def tasks(self) -> list[Task]:
        """The videos that came to no end yet."""
        return [
            (shard, member) for shard, opened in self._open.items() for member in opened.missing()
        ]

    def take(self, task: Task, item: Scored | Finished | Failed) -> None:
        """Scores of a part of a video, or its end. The file of a shard's last one is written."""
        shard, member = task
        opened = self._open[shard]
        if isinstance(item, Scored):
            opened.append(member, item)
        elif opened.end(member, item):
            self.num_videos += 1
            if opened.whole:
                self._close(shard)

    def reopen_failed(self) -> None:
        """Forget that videos failed."""
        for opened in self._open.values():
            opened.failed.clear()

    def leave_out_failed(self) -> None:
        """Count the videos that failed as those that do not decode."""
        for opened in self._open.values():
            opened.unreadable |= opened.failed
            opened.failed.clear()

    def write(self) -> None:
        """What there is of the shards that are still open."""
        for shard, opened in list(self._open.items()):
            if opened.whole:
                self._close(shard)
            elif opened.begun:
                opened.write()

    def _close(self, shard: int) -> None:
        self._open.pop(shard).write()
        self.num_files += 1


class _OpenShard:
    """The scores of one shard on their way into its file; first those that stand there."""

    def __init__(self, job: ScoringJob, shard: int) -> None:
        self._job, self._shard, self._keys = job, shard, job.keys(shard)
        self._parts: dict[int, list[Scored]] = {}
        self._videos: dict[str, VideoScores] = {}
        # Why videos have no scores, and how others failed.
        self.unreadable: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        for key, found in stored(job.path(shard), job.spec, self._keys):
            if isinstance(found, VideoScores):
                self._videos[key] = found
            else:
                self.unreadable[key] = found

    @property
    def whole(self) -> bool:
        return len(self._videos) + len(self.unreadable) == len(self._keys)

    @property
    def begun(self) -> bool:
        return bool(self._videos or self.unreadable or self.failed)

    def missing(self) -> list[int]:
        ended = self._videos.keys() | self.unreadable.keys() | self.failed.keys()
        return [member for member, key in enumerate(self._keys) if key not in ended]

    def append(self, member: int, scored: Scored) -> None:
        self._parts.setdefault(member, []).append(scored)

    def end(self, member: int, how: Finished | Failed) -> bool:
        """Whether that is true of the video: it has scores, or a reason in itself why not."""
        sample = self._job.shards.index(self._shard).samples[member]
        parts = self._parts.pop(member, [])
        if isinstance(how, Finished):
            video = _joined(parts, self._job.spec.times(sample.num_frames))
            if np.isfinite(video.scores).all():
                self._videos[sample.key] = video
                return True
            how = Failed("not_finite", "a score is no finite number", rejected=True)
        why = f"{how.reason} ({how.message})"
        (self.unreadable if how.rejected else self.failed)[sample.key] = why
        tqdm.write(f"{'without scores' if how.rejected else 'failed'}: {sample.key!r}: {why}")
        return how.rejected

    def write(self) -> None:
        data = file_bytes(self._job.spec, self._videos, self.unreadable)
        write_bytes(self._job.path(self._shard), data)


def _finish(job: ScoringJob, worked: bool) -> tuple[list[str], ScoreContents | None]:
    """What the last rank does: scores.json, or which videos have no scores yet.

    Whoever looks here has written its own files, so the last one finds all there. worked: a rank
    that had nothing to do is not the last one as long as videos are lacking; others are on them.
    """
    shards = range(len(job.shards.manifest.shards))
    # First without reading: most ranks end before the others.
    if not all(job.path(shard).exists() for shard in shards):
        return [], None
    lacking = [key for shard in shards for key in job.lacking(shard)]
    if lacking:
        return lacking if worked else [], None
    contents = contents_of(job.output, job.spec, job.shards)
    # Ranks that end at the same moment both write it, with the same bytes.
    own = job.output / f"{SCORES}.{job.rank}"
    write_bytes(own, dump_json(contents))
    own.rename(job.output / SCORES)
    return [], contents


def _joined(parts: list[Scored], times: int) -> VideoScores:
    """The windows of a video in a row, without the times after its end."""
    with np.errstate(over="ignore"):  # said by `end`
        scores = _row([part.scores for part in parts], times).astype(np.float16)
    codes: list[Any] = [part.codes for part in parts]
    return VideoScores(scores, None if codes[0] is None else _row(codes, times).astype(np.int32))


def _row(parts: list[np.ndarray], times: int) -> np.ndarray:
    windows = np.concatenate(parts)
    return windows.reshape(-1, *windows.shape[2:])[:times]
