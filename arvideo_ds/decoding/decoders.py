"""Frames of a video by their numbers, from bytes, through whichever decoder this machine has.

A decoder is a function (bytes, frame numbers) -> uint8 array F H W 3. All of them return the same
frames for the same numbers; a contract test holds them to it. Each call opens, reads and closes:
cached readers are what makes workers grow.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import av
import numpy as np

from arvideo_ds.decoding.video import TranscodeSettings, decodable_frames, encode, open_video
from arvideo_ds.errors import UserError

Decoder = Callable[[bytes, np.ndarray], np.ndarray]


class DecodeError(Exception):
    """A video that does not decode; the loader skips and counts it by `kind`."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(kind, message)
        self.kind, self.message = kind, message


def decode_torchcodec(data: bytes, frames: np.ndarray) -> np.ndarray:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(data, dimension_order="NHWC", num_ffmpeg_threads=1)
    return decoder.get_frames_at(indices=frames.tolist()).data.numpy()


def decode_decord(data: bytes, frames: np.ndarray) -> np.ndarray:
    from decord import VideoReader

    return VideoReader(io.BytesIO(data), num_threads=1).get_batch(frames.tolist()).asnumpy()


def decode_pyav(data: bytes, frames: np.ndarray) -> np.ndarray:
    """Decodes from the start up to the last frame wanted: exact on any file, slow on long ones."""
    wanted, found = set(frames.tolist()), {}
    with _open_pyav(data) as (container, stream):
        for number, frame in enumerate(decodable_frames(container, stream)):
            if number in wanted:
                found[number] = frame.to_ndarray(format="rgb24")
                if len(found) == len(wanted):
                    break
    missing = sorted(wanted - found.keys())
    if missing:
        raise DecodeError("short", f"frame {missing[0]} is not there")
    return np.stack([found[number] for number in frames.tolist()])


@contextlib.contextmanager
def _open_pyav(data: bytes) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    with open_video(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        yield container, stream


def _count_torchcodec(data: bytes) -> int:
    from torchcodec.decoders import VideoDecoder

    return len(VideoDecoder(data, num_ffmpeg_threads=1))


def _count_decord(data: bytes) -> int:
    from decord import VideoReader

    return len(VideoReader(io.BytesIO(data), num_threads=1))


def _count_pyav(data: bytes) -> int:
    with _open_pyav(data) as (container, stream):
        return sum(1 for _ in decodable_frames(container, stream))


# In order of preference: the fastest on short-GOP files first (docs: DATA, decoder table).
DECODERS: dict[str, Decoder] = {
    "torchcodec": decode_torchcodec,
    "decord": decode_decord,
    "pyav": decode_pyav,
}
_COUNTERS: dict[str, Callable[[bytes], int]] = {
    "torchcodec": _count_torchcodec,
    "decord": _count_decord,
    "pyav": _count_pyav,
}
# decord begins its messages with the time and a path: the same fault must read the same.
_LOG_PREFIX = re.compile(r"^\[\d\d:\d\d:\d\d\] \S+:\d+: ")


def available_decoders() -> dict[str, str]:
    """Name -> empty text if it works here, else the first line of why not."""
    return {name: _load_problem(name) for name in DECODERS}


def choose_decoder(name: str) -> str:
    """The decoder asked for, or for "auto" the first that works.

    Errors: `UserError` when it does not work; the message has its reason and the ones that do.
    """
    if name == "auto":
        return next(name for name in DECODERS if not _load_problem(name))
    problem = _load_problem(name)
    if problem:
        usable = [other for other, why in available_decoders().items() if not why]
        raise UserError(
            f"data.decoder={name} does not work here ({problem}). Usable: {', '.join(usable)}, or "
            "data.decoder=auto."
        )
    return name


def decode(name: str, data: bytes, frames: np.ndarray) -> np.ndarray:
    """Frames F H W 3, uint8. Errors: `DecodeError`, whatever the library raised."""
    return _translated(DECODERS[name], data, frames)


def count_frames(name: str, data: bytes) -> int:
    """Frames that this decoder says there are. Errors: `DecodeError`."""
    return _translated(_COUNTERS[name], data)


def _translated(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except DecodeError:
        raise
    except Exception as error:  # each library has its own
        first_line = str(error).strip().partition("\n")[0]
        message = f"{function.__name__}: {_LOG_PREFIX.sub('', first_line)}"
        raise DecodeError(type(error).__name__, message) from None


@functools.lru_cache
def _load_problem(name: str) -> str:
    """Decode a real video of three frames: libraries import lazily, so importing proves little."""
    try:
        DECODERS[name](_tiny_video(), np.array([0, 2]))
    except (
        Exception
    ) as error:  # each library fails in its own way where FFmpeg or a wheel is missing
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return ""


def _tiny_video() -> bytes:
    blank = (av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8)) for _ in range(3))
    frames = (frame.reformat(format="yuv420p") for frame in blank)
    return encode(frames, rate=Fraction(3), settings=TranscodeSettings())
