"""One file to one sample; runs in a process that can be killed (decoding/processes.py)."""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from arvideo_ds.decoding.decoders import DecodeError, count_frames, decisive_decoders, decode
from arvideo_ds.decoding.video import (
    MAX_PIXELS,
    Part,
    RejectedError,
    TranscodeSettings,
    VideoInfo,
    encode_picture,
    probe,
    transcode,
)
from arvideo_ds.shards.images import read_image
from arvideo_ds.shards.video_files import IMAGE_SUFFIXES

# A file with a smaller share of decodable frames is truncated or damaged.
MIN_DECODABLE = 0.9
# Frames for the comparison of decoders, and the largest mean difference (of 0..255) of rounding.
_COMPARED = 8
_LARGEST_DIFFERENCE = 2.0
# Fewer frames where they are larger than 4K: all decoders' frames are in memory at once.
_COMPARED_PIXELS = _COMPARED * 4096 * 2160
# Fields of VideoInfo that are not facts of a sample.
_INTERNAL = "sizes promised_frames packets damaged_packets hidden_packets rotation".split()


@dataclass(frozen=True)
class Sample:
    """A video ready for a shard."""

    video: bytes
    suffix: str
    facts: dict[str, Any]


def ingest(
    path: Path,
    settings: TranscodeSettings | None,
    part: Part | None = None,
    max_pixels: int = MAX_PIXELS,
    decoders: Sequence[str] | None = None,
) -> Sample:
    """Read, probe and, with settings, transcode one file or a part of it; an image becomes a video
    of one frame.

    decoders: must all read the sample; default `decisive_decoders`. Errors: `RejectedError` with
    the reason, also where memory runs out.
    """
    decoders = decoders or decisive_decoders()
    suffix = path.suffix.lower().removeprefix(".")
    try:
        with open_source(path) as file:
            is_image = path.suffix.lower() in IMAGE_SUFFIXES
            if is_image and settings is not None and part is None:
                picture = read_image(file, max_pixels)
                data = encode_picture(picture, settings, max_pixels=max_pixels)
                return ingest_bytes(data, "mp4", decoders)
            return _ingest(file, suffix, settings, part, max_pixels, decoders)
    except MemoryError:
        raise RejectedError(
            "too_large", "needs more memory than a process may use (make_shards.py --memory_gib)"
        ) from None


@contextlib.contextmanager
def open_source(path: Path) -> Iterator[BinaryIO]:
    """Open a video file. Errors: `RejectedError`, also for an `OSError` in the context."""
    try:
        with path.open("rb") as file:
            if not file.read(1):
                raise RejectedError("empty", "the file has 0 bytes")
            file.seek(0)
            yield file
    except OSError as error:
        raise RejectedError("unreadable", str(error)) from None


def _ingest(
    file: BinaryIO,
    suffix: str,
    settings: TranscodeSettings | None,
    part: Part | None,
    max_pixels: int,
    decoders: Sequence[str],
) -> Sample:
    source = probe(file, part, max_pixels=max_pixels)
    require_complete(source)
    file.seek(0)
    if settings is None:
        try:
            return _copied(file.read(), suffix, source, decoders)
        except RejectedError as error:
            message = f"{error.message}; use --video transcode"
            raise RejectedError(error.reason, message) from None
    data = transcode(file, settings, part, max_pixels=max_pixels)
    info = probe(io.BytesIO(data), max_pixels=max_pixels)
    # The copy shows the damage of the original, but decodes without errors.
    info.damaged_packets = source.damaged_packets
    return _sample(data, "mp4", info, decoders)


def ingest_bytes(data: bytes, suffix: str, decoders: Sequence[str] | None = None) -> Sample:
    """An unchanged video from memory. decoders, errors: as in `ingest`."""
    if not data:
        raise RejectedError("empty", "the file has 0 bytes")
    info = probe(io.BytesIO(data))
    require_complete(info)
    return _copied(data, suffix, info, decoders or decisive_decoders())


def _copied(data: bytes, suffix: str, info: VideoInfo, decoders: Sequence[str]) -> Sample:
    if len(info.sizes) > 1:
        raise RejectedError("size_changes", f"frames of {sorted(info.sizes)}")
    if info.rotation:
        raise RejectedError("rotated", f"shown rotated by {info.rotation} degrees")
    return _sample(data, suffix, info, decoders)


def require_complete(info: VideoInfo) -> None:
    """Errors: `RejectedError` where too few of the promised frames decode, or decode soundly."""
    promised = info.promised_frames - info.hidden_packets
    if info.num_frames < MIN_DECODABLE * promised:
        present = info.packets - info.hidden_packets
        reason = "truncated" if present < MIN_DECODABLE * promised else "damaged"
        raise RejectedError(reason, f"{info.num_frames} of {promised} promised frames decode")
    if info.damaged_packets > (1 - MIN_DECODABLE) * info.packets:
        message = f"the decoder reports errors in {info.damaged_packets} of {info.packets} packets"
        raise RejectedError("damaged", message)


def _frames_for_all(names: Sequence[str], data: bytes, info: VideoInfo) -> int:
    """The number of frames that each decoder reads: training may use any of them.

    Errors: `RejectedError` where one cannot read the file, or they disagree.
    """
    counts = {"probe": info.num_frames}
    try:
        for name in names:
            decode(name, data, np.array([0]))
            counts[name] = count_frames(name, data)
        num_frames = _readable(names, data, counts)
        _require_same_frames(names, data, num_frames, info.width * info.height)
    except DecodeError as error:
        if error.kind == MemoryError.__name__:
            raise MemoryError from None
        raise RejectedError("decoder_fails", error.message) from None
    return num_frames


def _readable(names: Sequence[str], data: bytes, counts: dict[str, int]) -> int:
    """The largest number of frames, up to the smallest count, whose last frame all can read."""
    for num_frames in range(min(counts.values()), 0, -1):
        if num_frames < MIN_DECODABLE * max(counts.values()):
            break
        # Some decoders count frames at the end that they cannot read.
        if all(_reads(name, data, num_frames - 1) for name in names):
            return num_frames
    listed = ", ".join(f"{name} {count}" for name, count in counts.items())
    raise RejectedError("decoders_disagree", f"frames: {listed}")


def _reads(name: str, data: bytes, number: int) -> bool:
    try:
        decode(name, data, np.array([number]))
    except DecodeError:
        return False
    return True


def _require_same_frames(names: Sequence[str], data: bytes, num_frames: int, pixels: int) -> None:
    """Compare several frames read together, and one read alone."""
    count = max(2, min(_COMPARED, _COMPARED_PIXELS // max(1, pixels)))
    spread = np.unique(np.linspace(0, num_frames - 1, count).round().astype(int))
    for numbers in (spread, spread[len(spread) // 2 :][:1]):
        reference, *others = (decode(name, data, numbers).astype(np.int16) for name in names)
        for name, frames in zip(names[1:], others, strict=True):
            same_shape = frames.shape == reference.shape
            if not same_shape or _difference(frames, reference) > _LARGEST_DIFFERENCE:
                raise RejectedError(
                    "decoders_disagree",
                    f"{name} and {names[0]} show other pictures under the same frame numbers",
                )


def _difference(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.abs(first - second).mean(axis=(1, 2, 3)).max())


def _sample(data: bytes, suffix: str, info: VideoInfo, decoders: Sequence[str]) -> Sample:
    info.num_frames = _frames_for_all(decoders, data, info)
    facts = {name: value for name, value in asdict(info).items() if name not in _INTERNAL}
    # Not written for 0: shards of sound videos keep their bytes.
    if info.damaged_packets:
        facts["decoder_errors"] = info.damaged_packets
    facts["bytes"] = len(data)
    facts["sha256"] = hashlib.sha256(data).hexdigest()
    return Sample(video=data, suffix=suffix, facts=facts)
