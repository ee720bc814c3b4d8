"""The contents of shards: counts and distributions from the facts, and a few of their videos."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from tqdm import tqdm

from arvideo_ds.decoding.decoders import decode
from arvideo_ds.decoding.processes import Failed, killable_map
from arvideo_ds.errors import UserError
from arvideo_ds.randomness import split_generator
from arvideo_ds.shards.manifest import IndexedSample, ShardSet, read_rejects
from arvideo_ds.shards.members import read_facts
from arvideo_ds.shards.video_files import read_at

# Pixels of a frame's longer side on the contact sheet, about two per pixel of the sheet.
_FRAME_SIDE = 480
_FRAME_TIMEOUT_S = 60.0
# Labels shown at either end, and values of a short list.
_SHOWN = 5
_GIB, _MIB = 2**30, 2**20


@dataclass(frozen=True)
class Inspection:
    """Facts of all samples and counts of them.

    Arrays have one value per sample: frames, seconds, frames per second, pixels. `label_counts`
    has every label of the manifest, in the order of the numbers.
    """

    dataset: str
    split: str | None
    num_shards: int
    shard_bytes: int
    num_frames: np.ndarray
    duration_s: np.ndarray
    fps: np.ndarray
    width: np.ndarray
    height: np.ndarray
    codecs: dict[str, int]
    label_counts: dict[str, int]
    num_unlabelled: int
    rejects: dict[str, int]
    # Packets with decoder errors, for each video that has any.
    decoder_errors: tuple[int, ...] = ()

    @property
    def num_samples(self) -> int:
        return len(self.num_frames)

    @property
    def short_side(self) -> np.ndarray:
        return np.minimum(self.width, self.height)

    @property
    def name(self) -> str:
        return self.dataset + (f", split {self.split}" if self.split else "")

    @property
    def most_frequent_labels(self) -> list[tuple[str, int]]:
        """All labels with their counts, the largest first."""
        return sorted(self.label_counts.items(), key=lambda item: (-item[1], item[0]))


@dataclass(frozen=True)
class Thumbnail:
    """The middle frame of a video, h w 3 (uint8), or the reason for its absence."""

    key: str
    label: str | None
    frame: np.ndarray | None
    problem: str = ""


def inspect_shards(folder: Path) -> Inspection:
    """Read the facts of every sample. Errors: `UserError` for missing or damaged shards."""
    shards = ShardSet(folder)
    shards.require_own()
    shards.check_sizes()
    if not shards.num_samples:
        raise UserError(f"the shards in {folder} contain no samples.")
    manifest = shards.manifest
    rows: list[tuple[float, ...]] = []
    decoder_errors: list[int] = []
    codecs, labels = Counter[str](), Counter[int | None]()
    with tqdm(total=shards.num_samples, unit="video", desc="facts") as bar:
        for number, shard in enumerate(manifest.shards):
            for fact in read_facts(folder / shard.name, shards.index(number).samples):
                rows.append((fact.num_frames, fact.duration_s, fact.fps, fact.width, fact.height))
                codecs[fact.codec] += 1
                labels[fact.label] += 1
                if fact.decoder_errors:
                    decoder_errors.append(fact.decoder_errors)
                bar.update()
    num_frames, duration_s, fps, width, height = np.array(rows).T
    rejects = Counter(reject.reason for reject in read_rejects(folder))
    return Inspection(
        dataset=manifest.dataset,
        split=manifest.split,
        num_shards=len(manifest.shards),
        shard_bytes=sum(shard.bytes for shard in manifest.shards),
        num_frames=num_frames.astype(int),
        duration_s=duration_s,
        fps=fps,
        width=width.astype(int),
        height=height.astype(int),
        codecs=dict(codecs.most_common()),
        label_counts={name: labels[n] for n, name in enumerate(manifest.labels or ())},
        num_unlabelled=labels[None],
        rejects=dict(rejects.most_common()),
        decoder_errors=tuple(decoder_errors),
    )


def table(inspection: Inspection, *, clip_frames: int) -> Iterator[tuple[str, str]]:
    """Rows of a name and a value; counts the videos that are shorter than a clip."""
    size, num_frames = inspection.shard_bytes, inspection.num_frames
    hours = inspection.duration_s.sum() / 3600
    readable = f"{size / _GIB:,.2f} GiB" if size >= _GIB else f"{size / _MIB:,.1f} MiB"
    yield "data set", inspection.name
    yield "samples", f"{inspection.num_samples:,}"
    yield "shards", f"{inspection.num_shards:,}, {readable}"
    yield "length", f"{hours:,.2f} h, {num_frames.sum():,} frames"
    yield "frames", _spread(num_frames)
    if count := int((num_frames < clip_frames).sum()):
        yield "short", f"{count:,} have fewer than {clip_frames} frames: their last is repeated"
    yield "seconds", _spread(inspection.duration_s)
    yield "short side", _spread(inspection.short_side)
    sizes = zip(inspection.width.tolist(), inspection.height.tolist(), strict=True)
    yield "sizes", _most_frequent(f"{width} x {height}" for width, height in sizes)
    yield "fps", _most_frequent(f"{value:g}" for value in inspection.fps.tolist())
    yield "codecs", _most_frequent(inspection.codecs)
    if errors := inspection.decoder_errors:
        videos = f"{len(errors):,} video" + "s" * (len(errors) > 1)
        yield "decoder errors", f"in {videos}, up to {max(errors):,} packets"
    yield from _label_rows(inspection)
    reasons = ", ".join(f"{reason} {n:,}" for reason, n in inspection.rejects.items())
    total = f"{sum(inspection.rejects.values()):,}"
    yield "rejected", f"{total}: {reasons}" if reasons else total


def _spread(values: np.ndarray) -> str:
    quantiles = np.quantile(values, (0, 0.05, 0.95, 1), method="nearest")
    low, p5, p95, high = (rounded(value) for value in quantiles)
    if low == high:
        return f"{low} (all)"
    return f"{low} to {high}, median {rounded(np.median(values))}, 90 % within {p5} to {p95}"


def rounded(value: float) -> str:
    """A value with at most two decimals."""
    return f"{round(float(value), 2):,g}"


def _most_frequent(values: Iterable[str] | Mapping[str, int]) -> str:
    """The most frequent values with their counts."""
    counts = Counter(values).most_common()
    shown = ", ".join(f"{value} ({count:,})" for value, count in counts[:_SHOWN])
    return shown + (f" and {len(counts) - _SHOWN:,} more" if len(counts) > _SHOWN else "")


def _label_rows(inspection: Inspection) -> Iterator[tuple[str, str]]:
    counts, unlabelled = inspection.most_frequent_labels, inspection.num_unlabelled
    if not counts:
        yield "labels", "none"
        return
    spread = _spread(np.array([count for _, count in counts]))
    without = f"; {unlabelled:,} samples have none" if unlabelled else ""
    yield "labels", f"{len(counts):,}; samples of each: {spread}{without}"
    for place, (label, count) in enumerate(counts):
        if place == _SHOWN and len(counts) > 2 * _SHOWN:
            yield "", f"{'...':>8}"
        if place < _SHOWN or place >= len(counts) - _SHOWN:
            yield "", f"{count:>8,}  {label}"


def thumbnails(folder: Path, count: int, *, seed: int, workers: int) -> list[Thumbnail]:
    """Middle frames of up to `count` videos, which `seed` chooses from all shards."""
    shards = ShardSet(folder)
    ends = np.cumsum(shards.samples_of_shards)
    calls = []
    for place in split_generator(seed).permutation(shards.num_samples)[:count]:
        number = int(np.searchsorted(ends, place, side="right"))
        sample = shards.index(number).samples[place - int(ends[number])]
        calls.append((folder / shards.manifest.shards[number].name, sample))
    frames = killable_map(middle_frame, calls, workers=workers, timeout_s=_FRAME_TIMEOUT_S)
    bar = tqdm(frames, total=len(calls), unit="video", desc="frames")
    labels, thumbs = shards.manifest.labels or (), []
    for (_, sample), frame in zip(calls, bar, strict=True):
        label = None if sample.label is None else labels[sample.label]
        if isinstance(frame, Failed):
            thumbs.append(Thumbnail(sample.key, label, None, f"{frame.reason}: {frame.message}"))
        else:
            thumbs.append(Thumbnail(sample.key, label, frame))
    return thumbs


def middle_frame(path: Path, sample: IndexedSample) -> np.ndarray:
    """The frame at half the length, h w 3 (uint8); large frames are scaled down."""
    with path.open("rb") as file:
        data = read_at(file.fileno(), sample.bytes, sample.offset)
    # PyAV is always installed, and exact.
    frame = decode("pyav", data, np.array([sample.num_frames // 2]))[0]
    scale = _FRAME_SIDE / max(frame.shape)
    if scale >= 1:
        return frame
    width, height = (max(1, round(side * scale)) for side in (frame.shape[1], frame.shape[0]))
    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
    return picture.reformat(width=width, height=height, interpolation="AREA").to_ndarray()


def format_rows(rows: Iterable[tuple[str, str]]) -> str:
    """Rows as lines with aligned values."""
    listed = list(rows)
    width = max(len(name) for name, _ in listed)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in listed)
