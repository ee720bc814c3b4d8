"""The scoring pass: shards -> windows -> scores of every token, one file per shard.

Rank r of R scores shards r, r + R, ...; ranks neither communicate nor wait for each other. A
shard's file is written atomically when all its videos are done, or when the pass ends before; the
videos in it are kept, so the same command continues. The rank that ends last finds all files there
and writes scores.json.

The final bytes of a file are a function of its shard and the spec alone: ranks, workers and
interruptions change nothing (on one kind of machine). A video is without scores only for a reason
in the video itself: it does not decode, or a score is not finite. A process that hangs or dies is
no such reason: the video is tried once more, and again by the next pass.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from arvideo_ds.data.sampling import window_frames
from arvideo_ds.data.transforms import fit_to_grid
from arvideo_ds.decoding.decoders import DecodeError, decode
from arvideo_ds.decoding.processes import Failed, Finished, stream_all
from arvideo_ds.decoding.video import RejectedError
from arvideo_ds.files.atomic import explained_when_full, write_bytes
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

# Frames that are decoded together, at the video's own size. Decoders hold them about twice.
_DECODED_BYTES = 128 * 2**20

# A video: number of its shard, place in it.
Task = tuple[int, int]


@dataclass(frozen=True)
class ScoringJob:
    """The arguments of `score_shards`.

    timeout_s: longest time from one window of a video to the next. leave_out_failed: record videos
    that hung or died twice like those that do not decode.
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
        """The videos that are missing in its file.

        Errors: `UserError` where the file is of another spec.
        """
        keys = self.keys(shard)
        present = {key for key, _ in stored(self.path(shard), self.spec, keys)}
        return [key for key in keys if key not in present]


@dataclass(frozen=True)
class ScoringReport:
    """What one rank did.

    failed: videos that hung or died twice, and how. If this rank was the last one: lacking, the
    videos of all ranks without scores; or contents, of the scores.json that it wrote.
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
    """Everything that determines the scores of these shards."""
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
    """Write this rank's missing files and, once all ranks' files exist, scores.json.

    stop: once true, the current videos are finished and no other is begun. Errors: `UserError`
    where the folder has scores of another spec, or its disk is full.
    """
    job.output.mkdir(parents=True, exist_ok=True)
    if (job.output / SCORES).exists():
        before = parse_contents((job.output / SCORES).read_bytes(), str(job.output))
        require_same(before.spec, job.spec, str(job.output))
    own = range(job.rank, len(job.shards.manifest.shards), job.num_ranks)
    missing = [shard for shard in own if job.lacking(shard) or not job.path(shard).exists()]
    with explained_when_full(job.output):
        shards = _score(job, missing, stop)
        interrupted = bool(shards.tasks())
        lacking, contents = ([], None) if interrupted else _finish(job, bool(missing))
    return ScoringReport(
        new_videos=shards.num_videos,
        new_files=shards.num_files,
        interrupted=interrupted,
        failed=shards.failed,
        lacking=lacking,
        contents=contents,
    )


def read_windows(job: ScoringJob, task: Task) -> Iterator[Piece]:
    """The windows of a video, one by one.

    As many as fit into `_DECODED_BYTES` at the video's own size are decoded at a time; the first
    one is decoded alone and shows the size. Errors: `RejectedError` where the video does not
    decode; `AlteredError` where the shard was altered, and `MemoryError`.
    """
    shard, member = task
    sample = job.shards.index(shard).samples[member]
    windows = window_frames(sample.num_frames, job.spec.stride, WINDOW)
    video = job.shards.read(shard, sample)
    first, count = 0, 1
    while first < len(windows):
        chosen = windows[first : first + count]
        frames = _decoded(job, video, chosen.ravel())
        for number, window in enumerate(np.split(frames, len(chosen)), first):
            fitted = fit_to_grid(window, job.spec.size, job.spec.patch[1:])
            yield Piece(sample.key, number, fitted[None])
        first, count = first + count, max(1, _DECODED_BYTES // window.nbytes)


def _decoded(job: ScoringJob, video: bytes, indices: np.ndarray) -> np.ndarray:
    try:
        return decode(job.decoder, video, indices)
    except DecodeError as error:
        if error.kind.endswith("MemoryError"):  # NumPy and PyAV have their own
            raise MemoryError(error.message) from None
        raise RejectedError(error.kind, error.message) from None


def _score(job: ScoringJob, missing: list[int], stop: Callable[[], bool]) -> _OpenShards:
    """Score the videos that these shards' files lack, and write the files."""
    shards = _OpenShards(job, missing)
    with tqdm(
        desc="scores", unit="video", total=len(shards.tasks()), miniters=0, disable=job.rank > 0
    ) as bar:
        _score_videos(job, shards, bar, stop)
        # The machine may have been busy: once more, after all others.
        shards.failed.clear()
        if not stop():  # no processes are started for nothing
            _score_videos(job, shards, bar, stop)
    if job.leave_out_failed:
        shards.settle_failed()
    shards.write()
    return shards


def _score_videos(
    job: ScoringJob, shards: _OpenShards, bar: tqdm, stop: Callable[[], bool]
) -> None:
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
    """This rank's shards whose files are missing or incomplete, and what is known of their videos.

    num_videos, num_files: videos that were settled and files that were completed in this pass.
    failed: videos that hung or died, by key, and how.
    """

    def __init__(self, job: ScoringJob, shards: list[int]) -> None:
        self._job = job
        self.num_videos = self.num_files = 0
        self.failed: dict[str, str] = {}
        # By shard and key: scores, or the reason in the video itself why it has none.
        self._videos = {
            shard: dict(stored(job.path(shard), job.spec, job.keys(shard))) for shard in shards
        }
        self._parts: defaultdict[Task, list[Scored]] = defaultdict(list)

    def tasks(self) -> list[Task]:
        """The videos that are neither settled nor failed."""
        return [
            (shard, member)
            for shard, videos in self._videos.items()
            for member, key in enumerate(self._job.keys(shard))
            if key not in videos and key not in self.failed
        ]

    def take(self, task: Task, item: Scored | Finished | Failed) -> None:
        """Scores of a part of a video, or its end. The file of a shard's last one is written."""
        if isinstance(item, Scored):
            self._parts[task].append(item)
            return
        shard, member = task
        sample = self._job.shards.index(shard).samples[member]
        result = _result(self._parts.pop(task, []), item, self._job.spec.times(sample.num_frames))
        if isinstance(result, Failed):
            why = f"{result.reason} ({result.message})"
            kind = "without scores" if result.rejected else "failed"
            tqdm.write(f"{kind}: {sample.key!r}: {why}")
            if not result.rejected:
                self.failed[sample.key] = why
                return
        self._videos[shard][sample.key] = why if isinstance(result, Failed) else result
        self.num_videos += 1
        if self._complete(shard):
            self._close(shard)

    def settle_failed(self) -> None:
        """Count the videos that failed as those that do not decode."""
        for shard, videos in self._videos.items():
            videos |= {key: self.failed[key] for key in self._job.keys(shard) if key in self.failed}
        self.failed.clear()

    def write(self) -> None:
        """Write what is known of the shards that are still open."""
        for shard, videos in list(self._videos.items()):
            if self._complete(shard):
                self._close(shard)
            elif videos or not self.failed.keys().isdisjoint(self._job.keys(shard)):
                self._write(shard)

    def _complete(self, shard: int) -> bool:
        return len(self._videos[shard]) == len(self._job.keys(shard))

    def _close(self, shard: int) -> None:
        self._write(shard)
        del self._videos[shard]
        self.num_files += 1

    def _write(self, shard: int) -> None:
        write_bytes(self._job.path(shard), file_bytes(self._job.spec, self._videos[shard]))


def _result(parts: list[Scored], end: Finished | Failed, times: int) -> VideoScores | Failed:
    """The scores of a video whose windows are `parts`, or why it has none."""
    if isinstance(end, Failed):
        return end
    with np.errstate(over="ignore"):  # found below
        scores = _joined([part.scores for part in parts], times).astype(np.float16)
    if not np.isfinite(scores).all():
        return Failed("not_finite", "a score is no finite number", rejected=True)
    codes: list[Any] = [part.codes for part in parts]
    return VideoScores(scores, None if codes[0] is None else _joined(codes, times).astype(np.int32))


def _joined(parts: list[np.ndarray], times: int) -> np.ndarray:
    """The windows of a video in a row, without the times after its end."""
    windows = np.concatenate(parts)
    return windows.reshape(-1, *windows.shape[2:])[:times]


def _finish(job: ScoringJob, worked: bool) -> tuple[list[str], ScoreContents | None]:
    """Write scores.json if this rank is the last one; else, which videos have no scores yet.

    Every rank has written its own files before, so the last one finds all files. worked: whether
    this rank had anything to do; if not, missing videos are those of ranks that are still running.
    """
    shards = range(len(job.shards.manifest.shards))
    # Existence first: most ranks end before the last one.
    if not all(job.path(shard).exists() for shard in shards):
        return [], None
    lacking = [key for shard in shards for key in job.lacking(shard)]
    if lacking:
        return lacking if worked else [], None
    contents = contents_of(job.output, job.spec, job.shards)
    # Ranks that end at the same moment all write it, with the same bytes.
    own = job.output / f"{SCORES}.{job.rank}"
    write_bytes(own, dump_json(contents))
    own.rename(job.output / SCORES)
    return [], contents
