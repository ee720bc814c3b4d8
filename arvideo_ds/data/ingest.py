"""One file to one sample.

Runs in a process of its own (see shard_writer): a decoder that crashes or hangs takes nothing with
it.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arvideo_ds.data.decoders import DecodeError, available_decoders, count_frames, decode
from arvideo_ds.data.video import (
    Part,
    RejectedError,
    TranscodeSettings,
    VideoInfo,
    probe,
    transcode,
)

# A file of which less than this share of the promised frames decodes is called truncated.
MIN_DECODABLE = 0.9


@dataclass(frozen=True)
class Sample:
    """A video ready for a shard."""

    video: bytes
    suffix: str
    facts: dict[str, Any]


def ingest(path: Path, settings: TranscodeSettings | None, part: Part | None = None) -> Sample:
    """Read, probe and, where settings are given, transcode one file or a part of it.

    Errors: `RejectedError` with the reason a user can count by.
    """
    try:
        with path.open("rb") as file:
            if not file.read(1):
                raise RejectedError("empty", "the file has 0 bytes")
            file.seek(0)
            info = probe(file, part)
            _require_complete(info)
            if settings is None:
                file.seek(0)
                return _copied(file.read(), path.suffix.lower().removeprefix("."), info)
            file.seek(0)
            data = transcode(file, settings, part)
    except OSError as error:
        raise RejectedError("unreadable", str(error)) from None
    return _sample(data, "mp4", probe(io.BytesIO(data)))


def _copied(data: bytes, suffix: str, info: VideoInfo) -> Sample:
    if len(info.sizes) > 1:
        raise RejectedError(
            "size_changes", f"frames of {sorted(info.sizes)}; use --video transcode"
        )
    if info.rotation:
        raise RejectedError(
            "rotated", f"shown rotated by {info.rotation} degrees; use --video transcode"
        )
    info.num_frames = _frames_for_all_decoders(data, info)
    return _sample(data, suffix, info)


def _require_complete(info: VideoInfo) -> None:
    if info.num_frames < MIN_DECODABLE * info.promised_frames:
        raise RejectedError(
            "truncated", f"{info.num_frames} of {info.promised_frames} promised frames decode"
        )


def _frames_for_all_decoders(data: bytes, info: VideoInfo) -> int:
    """How many frames every decoder of this machine reads: training may use any of them.

    Errors: `RejectedError` where they disagree by much or one cannot read the file at all.
    """
    counts = {"probe": info.num_frames}
    names = [name for name, problem in available_decoders().items() if not problem]
    for name in names:
        try:
            counts[name] = count_frames(name, data)
        except DecodeError as error:
            raise RejectedError(
                "decoder_fails", f"{name}: {error.message}; use --video transcode"
            ) from None
    num_frames = min(counts.values())
    if num_frames < MIN_DECODABLE * max(counts.values()) or num_frames < 1:
        raise RejectedError("decoders_disagree", f"{_listed(counts)}; use --video transcode")
    for name in names:
        try:
            decode(name, data, np.array([0, num_frames - 1]))
        except DecodeError as error:
            raise RejectedError(
                "decoder_fails",
                f"{name} on frame {num_frames - 1}: {error.message}; use --video transcode",
            ) from None
    return num_frames


def _listed(counts: dict[str, int]) -> str:
    return "frames: " + ", ".join(f"{name} {count}" for name, count in counts.items())


def _sample(data: bytes, suffix: str, info: VideoInfo) -> Sample:
    facts = asdict(info)
    for internal in ("sizes", "promised_frames", "damaged_packets", "rotation"):
        del facts[internal]
    facts["bytes"] = len(data)
    facts["sha256"] = hashlib.sha256(data).hexdigest()
    return Sample(video=data, suffix=suffix, facts=facts)
