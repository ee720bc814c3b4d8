"""One file to one sample; runs in a process that can be killed (decoding/processes.py)."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arvideo_ds.decoding.decoders import DecodeError, count_frames, decisive_decoders, decode
from arvideo_ds.decoding.video import (
    MAX_PIXELS,
    Part,
    RejectedError,
    TranscodeSettings,
    VideoInfo,
    probe,
    transcode,
)

# A file of which less than this share of the promised frames decodes is called truncated.
MIN_DECODABLE = 0.9
# Frames on which decoders are compared, and the mean difference of 0..255 that is still rounding.
_COMPARED = 8
_LARGEST_DIFFERENCE = 2.0
# Fewer frames are compared where they are larger than 4K: all decoders' are in memory at once.
_COMPARED_PIXELS = _COMPARED * 4096 * 2160
# What probing found out that no sample needs to say.
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
    """Read, probe and, where settings are given, transcode one file or a part of it.

    decoders: those that must read the sample; default `decisive_decoders`. Errors: `RejectedError`
    with the reason a user can count by, also where memory runs out.
    """
    try:
        return _ingest(path, settings, part, max_pixels, decoders or decisive_decoders())
    except OSError as error:
        raise RejectedError("unreadable", str(error)) from None
    except MemoryError:
        raise RejectedError(
            "too_large", "needs more memory than a process may use (make_shards.py --memory_gib)"
        ) from None


def _ingest(
    path: Path,
    settings: TranscodeSettings | None,
    part: Part | None,
    max_pixels: int,
    decoders: Sequence[str],
) -> Sample:
    with path.open("rb") as file:
        if not file.read(1):
            raise RejectedError("empty", "the file has 0 bytes")
        file.seek(0)
        found = probe(file, part, max_pixels=max_pixels)
        require_complete(found)
        if settings is None:
            file.seek(0)
            suffix = path.suffix.lower().removeprefix(".")
            try:
                return _copied(file.read(), suffix, found, decoders)
            except RejectedError as error:
                message = f"{error.message}; use --video transcode"
                raise RejectedError(error.reason, message) from None
        file.seek(0)
        data = transcode(file, settings, part, max_pixels=max_pixels)
    info = probe(io.BytesIO(data), max_pixels=max_pixels)
    # The copy shows the damage of the original, and its decoder knows nothing of it.
    info.damaged_packets = found.damaged_packets
    info.num_frames = _frames_for_all(decoders, data, info)
    return _sample(data, "mp4", info)


def ingest_bytes(data: bytes, suffix: str, decoders: Sequence[str] | None = None) -> Sample:
    """A video as it is, from memory. decoders and errors: as of `ingest`."""
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
    info.num_frames = _frames_for_all(decoders, data, info)
    return _sample(data, suffix, info)


def require_complete(info: VideoInfo) -> None:
    """Errors: `RejectedError` where far fewer frames decode, or do so without errors, than the
    header promises."""
    promised = info.promised_frames - info.hidden_packets
    if info.num_frames < MIN_DECODABLE * promised:
        there = info.packets - info.hidden_packets
        reason = "truncated" if there < MIN_DECODABLE * promised else "damaged"
        raise RejectedError(reason, f"{info.num_frames} of {promised} promised frames decode")
    if info.damaged_packets > (1 - MIN_DECODABLE) * info.packets:
        message = f"the decoder reports errors in {info.damaged_packets} of {info.packets} packets"
        raise RejectedError("damaged", message)


def _frames_for_all(names: Sequence[str], data: bytes, info: VideoInfo) -> int:
    """How many frames each of these decoders reads: training may use any of them.

    Errors: `RejectedError` where one cannot read the file, or they disagree on it.
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
    """The largest number of frames, up to the smallest count, whose last one all can read."""
    for num_frames in range(min(counts.values()), 0, -1):
        if num_frames < MIN_DECODABLE * max(counts.values()):
            break
        # Some decoders count frames at the end that they then cannot read.
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
    """The same numbers must mean the same frames, read together or one alone."""
    count = max(2, min(_COMPARED, _COMPARED_PIXELS // max(1, pixels)))
    spread = np.unique(np.linspace(0, num_frames - 1, count).round().astype(int))
    for numbers in (spread, spread[len(spread) // 2 :][:1]):
        reference, *others = (decode(name, data, numbers).astype(np.int16) for name in names)
        for name, found in zip(names[1:], others, strict=True):
            same_shape = found.shape == reference.shape
            if not same_shape or _difference(found, reference) > _LARGEST_DIFFERENCE:
                raise RejectedError(
                    "decoders_disagree",
                    f"{name} and {names[0]} show other pictures under the same frame numbers",
                )


def _difference(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.abs(first - second).mean(axis=(1, 2, 3)).max())


def _sample(data: bytes, suffix: str, info: VideoInfo) -> Sample:
    facts = asdict(info)
    for internal in _INTERNAL:
        del facts[internal]
    # Not written where there are none: shards of sound videos keep their bytes.
    if info.damaged_packets:
        facts["decoder_errors"] = info.damaged_packets
    facts["bytes"] = len(data)
    facts["sha256"] = hashlib.sha256(data).hexdigest()
    return Sample(video=data, suffix=suffix, facts=facts)
