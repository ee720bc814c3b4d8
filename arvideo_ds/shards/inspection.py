"""What a set of shards holds: counts and distributions from the facts, and a few of its videos."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from pydantic import ValidationError
from tqdm import tqdm

from arvideo_ds.decoding.decoders import decode
from arvideo_ds.decoding.processes import Failed, killable_map
from arvideo_ds.errors import UserError
from arvideo_ds.randomness import split_generator
from arvideo_ds.shards.manifest import REJECTS, IndexedSample, Reject, ShardSet
from arvideo_ds.shards.members import Facts, read_facts

# Pixels of the longer side of a frame on the contact sheet; two per pixel of the sheet or so.
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
    # Of the videos that have any, how many packets the decoder reported errors in.
    decoder_errors: tuple[int, ...] = ()

    @property
    def num_samples(self) -> int:
        return len(self.num_frames)

    @property
    def short_side(self) -> np.ndarray:
        return np.minimum(self.width, self.height)


@dataclass(frozen=True)
class Thumbnail:
    """The middle frame of a video, h w 3 (uint8), or why there is none."""

    key: str
    label: str | None
    frame: np.ndarray | None
    problem: str = ""


def inspect_shards(folder: Path) -> Inspection:
    """Read the facts of every sample.

    Errors: `UserError` without shards, or where one is damaged.
    """
    shards = ShardSet(folder)
    shards.require_own()
    shards.check_sizes()
    if not shards.num_samples:
        raise UserError(f"the shards in {folder} hold no samples.")
    manifest = shards.manifest
    rows: list[tuple[float, ...]] = []
    decoder_errors: list[int] = []
    codecs, labels = Counter[str](), Counter[int | None]()
    for fact in tqdm(_all_facts(shards), total=shards.num_samples, unit="video", desc="facts"):
        rows.append((fact.num_frames, fact.duration_s, fact.fps, fact.width, fact.height))
        codecs[fact.codec] += 1
        if fact.decoder_errors:
            decoder_errors.append(fact.decoder_errors)
        labels[fact.label] += 1
    num_frames, duration_s, fps, width, height = np.array(rows).T
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
        rejects=_rejects_by_reason(folder / REJECTS),
        decoder_errors=tuple(decoder_errors),
    )


def _all_facts(shards: ShardSet) -> Iterator[Facts]:
    for number, shard in enumerate(shards.manifest.shards):
        yield from read_facts(shards.folder / shard.name, shards.index(number).samples)


def _rejects_by_reason(path: Path) -> dict[str, int]:
    try:
        lines = path.read_bytes().splitlines()
        reasons = Counter(Reject.model_validate_json(line).reason for line in lines)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from None
    except ValidationError:
        raise UserError(f"{path} has lines that are no rejects; copy it again.") from None
    return dict(reasons.most_common())


def table(found: Inspection, *, clip_frames: int) -> list[tuple[str, str]]:
    """Rows of a name and a value, for people; videos shorter than a clip are counted."""
    name = found.dataset + (f", split {found.split}" if found.split else "")
    size = found.shard_bytes
    readable = f"{size / _GIB:,.2f} GiB" if size >= _GIB else f"{size / _MIB:,.1f} MiB"
    sizes = Counter(zip(found.width.tolist(), found.height.tolist(), strict=True))
    rows = [
        ("data set", name),
        ("samples", f"{found.num_samples:,}"),
        ("shards", f"{found.num_shards:,}, {readable}"),
        ("length", f"{found.duration_s.sum() / 3600:,.2f} h, {found.num_frames.sum():,} frames"),
        ("frames", _spread(found.num_frames)),
        *_short_row(found, clip_frames),
        ("seconds", _spread(found.duration_s)),
        ("short side", _spread(found.short_side)),
        ("sizes", _commonest({f"{w} x {h}": n for (w, h), n in sizes.most_common()})),
        ("fps", _commonest({f"{v:g}": n for v, n in Counter(found.fps.tolist()).most_common()})),
        ("codecs", _commonest(found.codecs)),
        *_damage_row(found),
        *_label_rows(found),
    ]
    left_out = f"{sum(found.rejects.values()):,}"
    if found.rejects:
        left_out += ": " + ", ".join(f"{reason} {n:,}" for reason, n in found.rejects.items())
    return [*rows, ("left out", left_out)]


def _short_row(found: Inspection, clip_frames: int) -> Iterator[tuple[str, str]]:
    if count := int((found.num_frames < clip_frames).sum()):
        yield "short", f"{count:,} have fewer than {clip_frames} frames: their last is repeated"


def _damage_row(found: Inspection) -> Iterator[tuple[str, str]]:
    if errors := found.decoder_errors:
        videos = f"{len(errors):,} video" + "s" * (len(errors) > 1)
        yield "decoder errors", f"in {videos}, up to {max(errors):,} packets"


def _spread(values: np.ndarray) -> str:
    quantiles = np.quantile(values, (0, 0.05, 0.95, 1), method="nearest")
    low, p5, p95, high = (rounded(value) for value in quantiles)
    if low == high:
        return f"{low} (all)"
    return f"{low} to {high}, median {rounded(np.median(values))}, 90 % within {p5} to {p95}"


def rounded(value: float) -> str:
    """A value for people: at most two decimals."""
    return f"{round(float(value), 2):,g}"


def _commonest(counts: dict[str, int]) -> str:
    """The commonest values with their counts; `counts` is sorted."""
    shown = [f"{value} ({count:,})" for value, count in list(counts.items())[:_SHOWN]]
    more = len(counts) - len(shown)
    return ", ".join(shown) + (f" and {more:,} more" if more else "")


def _label_rows(found: Inspection) -> Iterator[tuple[str, str]]:
    if not found.label_counts:
        yield "labels", "none"
        return
    counts = sorted(found.label_counts.items(), key=lambda item: (-item[1], item[0]))
    unlabelled = f"; {found.num_unlabelled:,} samples have none" if found.num_unlabelled else ""
    spread = _spread(np.array([count for _, count in counts]))
    yield "labels", f"{len(counts):,}; samples of each: {spread}{unlabelled}"
    for place, (label, count) in enumerate(counts):
        if place == _SHOWN and len(counts) > 2 * _SHOWN:
            yield "", f"{'...':>8}"
        if place < _SHOWN or place >= len(counts) - _SHOWN:
            yield "", f"{count:>8,}  {label}"


def thumbnails(folder: Path, count: int, *, seed: int, workers: int) -> list[Thumbnail]:
    """Middle frames of up to `count` videos, drawn by `seed` from all shards."""
    shards = ShardSet(folder)
    chosen = list(_draw(shards, count, seed))
    calls = [
        (shards.folder / shards.manifest.shards[number].name, sample) for number, sample in chosen
    ]
    frames = killable_map(middle_frame, calls, workers=workers, timeout_s=_FRAME_TIMEOUT_S)
    bar = tqdm(frames, total=len(chosen), unit="video", desc="frames")
    labels, found = shards.manifest.labels or (), []
    for (_, sample), frame in zip(chosen, bar, strict=True):
        label = None if sample.label is None else labels[sample.label]
        if isinstance(frame, Failed):  # it is shown as such
            problem = f"{frame.reason}: {frame.message}"
            found.append(Thumbnail(sample.key, label, None, problem))
        else:
            found.append(Thumbnail(sample.key, label, frame))
    return found


def _draw(shards: ShardSet, count: int, seed: int) -> Iterator[tuple[int, IndexedSample]]:
    """Pairs of a shard's number and a sample, random over all samples."""
    ends = np.cumsum(shards.samples_of_shards)
    for place in split_generator(seed).permutation(shards.num_samples)[:count]:
        number = int(np.searchsorted(ends, place, side="right"))
        yield number, shards.index(number).samples[place - int(ends[number])]


def middle_frame(path: Path, sample: IndexedSample) -> np.ndarray:
    """The frame at half the length, h w 3 (uint8), made smaller where it is large."""
    with path.open("rb") as file:
        file.seek(sample.offset)
        data = file.read(sample.bytes)
    # PyAV: it is always there, and exact.
    frame = decode("pyav", data, np.array([sample.num_frames // 2]))[0]
    scale = _FRAME_SIDE / max(frame.shape)
    if scale >= 1:
        return frame
    width, height = (max(1, round(side * scale)) for side in (frame.shape[1], frame.shape[0]))
    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
    return picture.reformat(width=width, height=height, interpolation="AREA").to_ndarray()


def format_rows(rows: Iterable[tuple[str, str]]) -> str:
    """Rows as lines, values aligned."""
    listed = list(rows)
    width = max(len(name) for name, _ in listed)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in listed)
