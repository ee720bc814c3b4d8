"""One file to one sample; runs in a process that can be killed (decoding/processes.py)."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import av
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
    read_frames,
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
_INTERNAL = (
    "sizes promised_frames packets damaged_packets hidden_packets rotation rate pixel_aspect stream"
).split()
_ReadOne = Callable[[str, int], np.ndarray]


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
    if settings is None:
        decoded = _decode_all(file, max_pixels)
        require_complete(decoded.info)
        file.seek(0)
        try:
            return _copied(file.read(), suffix, decoded, decoders)
        except RejectedError as error:
            message = f"{error.message}; use --video transcode"
            raise RejectedError(error.reason, message) from None
    try:
        data, source = transcode(file, settings, part, max_pixels=max_pixels)
    except Exception:
        # A fault of the source explains more than what the encoder reports.
        file.seek(0)
        require_complete(probe(file, part, max_pixels=max_pixels))
        raise
    require_complete(source)
    decoded = _decode_all(io.BytesIO(data), max_pixels)
    # The copy shows the damage of the original, but decodes without errors.
    return _sample(data, "mp4", decoded, decoders, source.damaged_packets)


def ingest_bytes(data: bytes, suffix: str, decoders: Sequence[str] | None = None) -> Sample:
    """An unchanged video from memory. decoders, errors: as in `ingest`."""
    if not data:
        raise RejectedError("empty", "the file has 0 bytes")
    decoded = _decode_all(io.BytesIO(data), MAX_PIXELS)
    require_complete(decoded.info)
    return _copied(data, suffix, decoded, decoders or decisive_decoders())


@dataclass(frozen=True)
class _Decoded:
    """The info of a video decoded in order, and some frames by number, the last among them."""

    info: VideoInfo
    frames: dict[int, av.VideoFrame]

    def pictures(self, numbers: Iterable[int]) -> np.ndarray:
        """F H W 3, uint8."""
        return np.stack([self.frames[number].to_ndarray(format="rgb24") for number in numbers])


def _decode_all(file: BinaryIO, max_pixels: int) -> _Decoded:
    kept: dict[int, av.VideoFrame] = {}
    with read_frames(file, max_pixels=max_pixels) as (info, frames):
        known = math.isfinite(info.length_s)
        expected = round(info.length_s * info.fps) if known else info.promised_frames
        numbers: set[int] = set()
        for number, frame in enumerate(frames):
            numbers = numbers or set(_spread(expected, info))
            if number in numbers:
                kept[number] = frame
    return _Decoded(info, {**kept, number: frame})


def _copied(data: bytes, suffix: str, decoded: _Decoded, decoders: Sequence[str]) -> Sample:
    info = decoded.info
    if len(info.sizes) > 1:
        raise RejectedError("size_changes", f"frames of {sorted(info.sizes)}")
    if info.rotation:
        raise RejectedError("rotated", f"shown rotated by {info.rotation} degrees")
    return _sample(data, suffix, decoded, decoders, info.damaged_packets)


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


def _frames_for_all(names: Sequence[str], data: bytes, decoded: _Decoded) -> int:
    """The number of frames that each decoder reads: training may use any of them.

    Errors: `RejectedError` where one cannot read the file, or they disagree.
    """
    counts = {"probe": decoded.info.num_frames}
    # Each decoder's last frame is needed twice.
    one = functools.lru_cache(len(names))(lambda name, n: decode(name, data, np.array([n])))
    try:
        for name in names:
            one(name, 0)
            counts[name] = _count(name, data, decoded.info)
        num_frames = _readable(names, one, counts)
        _require_same_frames(names, data, num_frames, decoded, one)
    except DecodeError as error:
        if error.kind == MemoryError.__name__:
            raise MemoryError from None
        raise RejectedError("decoder_fails", error.message) from None
    return num_frames


def _count(name: str, data: bytes, info: VideoInfo) -> int:
    # PyAV counts by decoding the first stream in order, which is done.
    return info.num_frames if name == "pyav" and not info.stream else count_frames(name, data)


def _readable(names: Sequence[str], one: _ReadOne, counts: dict[str, int]) -> int:
    """The largest number of frames, up to the smallest count, whose last frame all can read."""
    for num_frames in range(min(counts.values()), 0, -1):
        if num_frames < MIN_DECODABLE * max(counts.values()):
            break
        # Some decoders count frames at the end that they cannot read.
        if all(_reads(one, name, num_frames - 1) for name in names):
            return num_frames
    listed = ", ".join(f"{name} {count}" for name, count in counts.items())
    raise RejectedError("decoders_disagree", f"frames: {listed}")


def _reads(one: _ReadOne, name: str, number: int) -> bool:
    try:
        one(name, number)
    except DecodeError:
        return False
    return True


def _require_same_frames(
    names: Sequence[str], data: bytes, num_frames: int, decoded: _Decoded, one: _ReadOne
) -> None:
    """Compare several frames read together, and one read alone."""
    reads: dict[str, Callable[[Any], np.ndarray]] = {
        name: functools.partial(decode, name, data) for name in names
    }
    numbers = _spread(num_frames, decoded.info)
    kept = sorted(number for number in decoded.frames if number < num_frames)
    is_kept = "pyav" in names and len(kept) >= len(numbers) and not decoded.info.stream
    if is_kept and _shows_after_seeks(decoded, one, (kept[-1], kept[len(kept) // 2])):
        numbers, reads["pyav"] = np.array(kept), decoded.pictures
        if len(names) == 1:
            return
    for group in (numbers, numbers[len(numbers) // 2 :][:1]):
        reference, *others = (read(group) for read in reads.values())
        for name, frames in zip(names[1:], others, strict=True):
            if not _same(frames, reference):
                raise RejectedError(
                    "decoders_disagree",
                    f"{name} and {names[0]} show other pictures under the same frame numbers",
                )


def _shows_after_seeks(decoded: _Decoded, one: _ReadOne, numbers: Iterable[int]) -> bool:
    """Whether PyAV's random access shows exactly the frames that it shows in order.

    Errors: `RejectedError` where a sound video differs; a lost frame may shift the later ones.
    """
    pairs = [(one("pyav", number), decoded.pictures([number])) for number in numbers]
    sound = not decoded.info.damaged_packets
    if sound and not all(_same(*pair) for pair in pairs):
        raise RejectedError("decoders_disagree", "pyav shows other pictures after a seek")
    return all(np.array_equal(*pair) for pair in pairs)


def _spread(num_frames: int, info: VideoInfo) -> np.ndarray:
    """Numbers of frames from the first to the last."""
    count = max(2, min(_COMPARED, _COMPARED_PIXELS // max(1, info.width * info.height)))
    return np.unique(np.linspace(0, max(0, num_frames - 1), count).round().astype(int))


def _same(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether frames F H W 3 are equal up to rounding."""
    if first.shape != second.shape:
        return False
    difference = np.abs(first.astype(np.int16) - second)
    return float(difference.mean(axis=(1, 2, 3)).max()) <= _LARGEST_DIFFERENCE


def _sample(
    data: bytes, suffix: str, decoded: _Decoded, decoders: Sequence[str], decoder_errors: int
) -> Sample:
    info = decoded.info
    info.num_frames = _frames_for_all(decoders, data, decoded)
    facts = {name: value for name, value in asdict(info).items() if name not in _INTERNAL}
    # Not written for 0: shards of sound videos keep their bytes.
    if decoder_errors:
        facts["decoder_errors"] = decoder_errors
    facts["bytes"] = len(data)
    facts["sha256"] = hashlib.sha256(data).hexdigest()
    return Sample(video=data, suffix=suffix, facts=facts)
