"""The scoring pass: shards -> windows -> scores of every token, one file per shard.

Rank r of R scores shards r, r + R, ... without communication. A shard's file is written atomically
when all its videos are scored, or when the pass ends before; the same command continues with the
missing videos. The rank that ends last finds all files and writes scores.json.

The bytes of a file depend only on its shard and the spec, not on ranks, workers or interruptions
(on one kind of machine). A video is recorded without scores only for a reason in the video: it does
not decode, or a score is not finite. One that hangs or crashes is tried once more, and again by the
next pass.
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
from arvideo_ds.geometry import Triple
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

# Bytes of frames decoded at a time, at the video's own size. Decoders use about twice as much.
_DECODED_BYTES = 128 * 2**20

# Number of the shard, index of the video in it.
VideoIndex = tuple[int, int]


@dataclass(frozen=True)
class ScoringJob:
    """The arguments of `score_shards`.

    timeout_s: longest time from one window of a video to the next. leave_out_failed: record videos
    that hung or crashed twice as without scores.
    """

    shards: ShardSet
    scorer: Scorer
    output: Path
    decoder: str
    stride: int
    size: tuple[int, int]
    patch: Triple
    workers: int = 0
    timeout_s: float = 120.0
    rank: int = 0
    num_ranks: int = 1
    leave_out_failed: bool = False

    @functools.cached_property
    def spec(self) -> ScoreSpec:
        return ScoreSpec(
            manifest=self.shards.hash,
            scorer=self.scorer.name,
            settings=self.scorer.settings,
            tokenizer=self.scorer.tokenizer,
            levels=self.scorer.levels,
            stride=self.stride,
            size=self.size,
            patch=self.patch,
        )

    def path(self, shard: int) -> Path:
        return self.output / file_name(shard)

    def keys(self, shard: int) -> list[str]:
        return [sample.key for sample in self.shards.index(shard).samples]

    def stored(self, shard: int) -> Iterator[tuple[str, VideoScores | str]]:
        """The intact entries of the shard's file. Errors: as `score_store.stored`."""
        return stored(self.path(shard), self.spec, self.keys(shard))


def _read_windows(job: ScoringJob, place: VideoIndex) -> Iterator[Piece]:
    """The windows of a video.

    As many as fit into `_DECODED_BYTES` are decoded at a time; the first one alone shows the size.
    Errors: `RejectedError` where the video does not decode; `AlteredError` where the shard was
    altered, and `MemoryError`.
    """
    shard, member = place
    sample = job.shards.index(shard).samples[member]
    windows = window_frames(sample.num_frames, job.stride, WINDOW)
    video = job.shards.read(shard, sample)
    first, count = 0, 1
    while first < len(windows):
        chosen = windows[first : first + count]
        try:
            frames = decode(job.decoder, video, chosen.ravel())
        except DecodeError as error:
            if error.kind.endswith("MemoryError"):  # NumPy and PyAV have their own
                raise MemoryError(error.message) from None
            raise RejectedError(error.kind, error.message) from None
        for number, window in enumerate(np.split(frames, len(chosen)), first):
            fitted = fit_to_grid(window, job.size, job.patch[1:])
            yield Piece(sample.key, number, fitted[None])
        first, count = first + count, max(1, _DECODED_BYTES // window.nbytes)


def _work(job: ScoringJob, place: VideoIndex) -> Iterator[Piece | Scored]:
    """Decode a video in a worker process, and score it there unless the scorer has a device."""
    for piece in _read_windows(job, place):
        yield piece if job.scorer.on_device else job.scorer(piece)


class ScoringPass:
    """The pass of one rank.

    new_videos, new_files: settled and completed in this pass. interrupted: whether videos are left.
    failed: videos that hung or crashed twice, by key, and how. For the rank that ends last:
    lacking, the videos of all ranks without scores; or contents, of the scores.json that it wrote.
    Errors: `UserError` where a file has scores of another spec.
    """

    def __init__(self, job: ScoringJob) -> None:
        self._job = job
        self.new_videos = self.new_files = 0
        self.interrupted = False
        self.failed: dict[str, str] = {}
        self.lacking: list[str] = []
        self.contents: ScoreContents | None = None
        # By open shard and key: scores, or the reason in the video itself for none.
        self._videos: dict[int, dict[str, VideoScores | str]] = {}
        self._parts: defaultdict[VideoIndex, list[Scored]] = defaultdict(list)
        for shard in range(job.rank, len(job.shards.manifest.shards), job.num_ranks):
            videos = dict(job.stored(shard))
            if len(videos) < len(job.keys(shard)) or not job.path(shard).exists():
                self._videos[shard] = videos
        self._had_work = bool(self._videos)

    def run(self, stop: Callable[[], bool]) -> None:
        total = len(self._places())
        with tqdm(
            desc="scores", unit="video", total=total, miniters=0, disable=self._job.rank > 0
        ) as bar:
            self._score_videos(bar, stop)
            # The machine may have been busy: try once more, after all others.
            self.failed.clear()
            if not stop():  # else processes would start for nothing
                self._score_videos(bar, stop)
        failed = self.failed.copy()
        if self._job.leave_out_failed:
            self.failed.clear()
        for shard in list(self._videos):
            why = {key: failed[key] for key in self._job.keys(shard) if key in failed}
            if self._job.leave_out_failed:
                self._videos[shard] |= why
            if not self._close_if_complete(shard) and (self._videos[shard] or why):
                self._write(shard)
        self.interrupted = bool(self._places())
        if not self.interrupted:
            self._finish()

    def _score_videos(self, bar: tqdm, stop: Callable[[], bool]) -> None:
        places = self._places()
        items = stream_all(
            functools.partial(_work, self._job),
            places,
            workers=min(self._job.workers, len(places)),
            timeout_s=self._job.timeout_s,
            stop=stop,
        )
        for place, item in items:
            self._take(place, self._job.scorer(item) if isinstance(item, Piece) else item)
            bar.update(self.new_videos - bar.n)

    def _places(self) -> list[VideoIndex]:
        """The videos that are neither settled nor failed."""
        return [
            (shard, member)
            for shard, videos in self._videos.items()
            for member, key in enumerate(self._job.keys(shard))
            if key not in videos and key not in self.failed
        ]

    def _take(self, place: VideoIndex, item: Scored | Finished | Failed) -> None:
        """Scores of a part of a video, or its end."""
        if isinstance(item, Scored):
            self._parts[place].append(item)
            return
        shard, member = place
        sample = self._job.shards.index(shard).samples[member]
        times = self._job.spec.times(sample.num_frames)
        result = _result(self._parts.pop(place, []), item, times)
        if isinstance(result, Failed):
            why = f"{result.reason} ({result.message})"
            kind = "without scores" if result.rejected else "failed"
            tqdm.write(f"{kind}: {sample.key!r}: {why}")
            if not result.rejected:
                self.failed[sample.key] = why
                return
        self._videos[shard][sample.key] = why if isinstance(result, Failed) else result
        self.new_videos += 1
        self._close_if_complete(shard)

    def _close_if_complete(self, shard: int) -> bool:
        if len(self._videos[shard]) < len(self._job.keys(shard)):
            return False
        self._write(shard)
        del self._videos[shard]
        self.new_files += 1
        return True

    def _write(self, shard: int) -> None:
        write_bytes(self._job.path(shard), file_bytes(self._job.spec, self._videos[shard]))

    def _finish(self) -> None:
        """Write scores.json if this rank is the last one and no video lacks scores."""
        job, shards = self._job, range(len(self._job.shards.manifest.shards))
        # Existence first: most ranks end before the last one.
        if not all(job.path(shard).exists() for shard in shards):
            return
        lacking = []
        for shard in shards:
            present = {key for key, _ in job.stored(shard)}
            lacking += [key for key in job.keys(shard) if key not in present]
        if lacking:
            # If it had no work, missing videos belong to ranks that are still running.
            self.lacking = lacking if self._had_work else []
            return
        self.contents = contents_of(job.output, job.spec, job.shards)
        # Ranks that end at the same moment all write it, with the same bytes.
        partial = job.output / f"{SCORES}.{job.rank}"
        write_bytes(partial, dump_json(self.contents))
        partial.rename(job.output / SCORES)


def score_shards(job: ScoringJob, *, stop: Callable[[], bool] = lambda: False) -> ScoringPass:
    """Write this rank's missing files and, once all ranks' files exist, scores.json.

    stop: once true, the current videos are finished and no other is begun. Errors: `UserError`
    where the folder has scores of another spec, or its disk is full.
    """
    job.output.mkdir(parents=True, exist_ok=True)
    if (job.output / SCORES).exists():
        before = parse_contents((job.output / SCORES).read_bytes(), str(job.output))
        require_same(before.spec, job.spec, str(job.output))
    scoring = ScoringPass(job)
    with explained_when_full(job.output):
        scoring.run(stop)
    return scoring


def _result(parts: list[Scored], end: Finished | Failed, times: int) -> VideoScores | Failed:
    """The scores of a video whose windows are `parts`, or why it has none."""
    if isinstance(end, Failed):
        return end
    with np.errstate(over="ignore"):  # checked below
        scores = _joined([part.scores for part in parts], times).astype(np.float16)
    if not np.isfinite(scores).all():
        return Failed("not_finite", "a score is not finite", rejected=True)
    codes: list[Any] = [part.codes for part in parts]
    return VideoScores(scores, None if codes[0] is None else _joined(codes, times).astype(np.int32))


def _joined(parts: list[np.ndarray], times: int) -> np.ndarray:
    """The windows of a video joined, without the times after its end."""
    windows = np.concatenate(parts)
    return windows.reshape(-1, *windows.shape[2:])[:times]
