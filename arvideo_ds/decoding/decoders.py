"""Frames of a video by their numbers, from bytes, by any decoder that works on this machine.

A decoder is a function (bytes, frame numbers) -> uint8 array F H W 3. All return the same frames,
up to rounding. Each call opens, reads and closes: cached readers would make workers grow.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from arvideo_ds.decoding.random_access import frames_by_number
from arvideo_ds.decoding.video import (
    TranscodeSettings,
    decodable_frames,
    encode,
    frame_rate,
    open_video,
)
from arvideo_ds.errors import UserError


class DecodeError(Exception):
    """A video does not decode; the loader skips it and counts it by `kind`."""

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
    decoded = _frames(data, set(frames.tolist()))
    first = decoded[int(frames[0])]
    pictures = np.empty((len(frames), first.height, first.width, 3), np.uint8)
    converter = VideoReformatter()
    for number, frame in decoded.items():
        # More threads would compete with the other workers.
        rgb = converter.reformat(frame, format="rgb24", threads=1)
        pictures[frames == number] = _view(rgb.planes[0], rgb.height, rgb.width, 3)
    return pictures


def decode_planes(data: bytes, frames: np.ndarray) -> np.ndarray:
    """Frames by PyAV as planes, F 3H/2 W: H rows of luma, then H/2 rows with U at the left and V at
    the right. Odd sizes are scaled to even ones. Errors: `DecodeError`."""
    return _translated(_planes, data, frames)


def _planes(data: bytes, frames: np.ndarray) -> np.ndarray:
    decoded = _frames(data, set(frames.tolist()))
    first = decoded[int(frames[0])]
    height, width = first.height // 2 * 2, first.width // 2 * 2
    pictures = np.empty((len(frames), height * 3 // 2, width), np.uint8)
    converter = VideoReformatter()
    for number, frame in decoded.items():
        even = converter.reformat(frame, width, height, format="yuv420p", threads=1)
        luma, *colours = even.planes
        place = frames == number
        pictures[place, :height] = _view(luma, height, width)
        for left, colour in zip((0, width // 2), colours, strict=True):
            half = _view(colour, height // 2, width // 2)
            pictures[place, height:, left : left + width // 2] = half
    return pictures


def _view(plane: av.video.plane.VideoPlane, *shape: int) -> np.ndarray:
    """A plane without the padding of its rows; shares its memory."""
    strides = (plane.line_size, *shape[2:], 1)
    return np.ndarray(shape, np.uint8, buffer=memoryview(plane), strides=strides)


def _frames(data: bytes, numbers: set[int]) -> dict[int, av.VideoFrame]:
    """From a key frame on where the file's index identifies the frames, as in transcoded videos;
    else from the start: exact for any file, slow for long ones."""
    with _open_pyav(data) as (container, stream):
        decoded = frames_by_number(container, stream, numbers)
    if len(decoded) < len(numbers):
        with _open_pyav(data) as (container, stream):
            decoded = _in_sequence(container, stream, numbers)
    missing = sorted(numbers - decoded.keys())
    if missing:
        raise DecodeError("short", f"frame {missing[0]} is not there")
    return decoded


def _as_rgb(frame: av.VideoFrame, converter: VideoReformatter) -> np.ndarray:
    # More threads would compete with the other workers.
    return converter.reformat(frame, format="rgb24", threads=1).to_ndarray()


def _as_planes(frame: av.VideoFrame, converter: VideoReformatter) -> np.ndarray:
    size = {"width": frame.width // 2 * 2, "height": frame.height // 2 * 2}
    planes = converter.reformat(frame, format="yuv420p", threads=1, **size).to_ndarray()
    # FFmpeg has rows of U above those of V; here they are side by side.
    rows, columns = size["height"], size["width"]
    colours = planes[rows:].reshape(2, rows // 2, columns // 2)
    return np.concatenate([planes[:rows], np.concatenate(colours, axis=1)])


def _in_sequence(
    container: av.container.InputContainer, stream: av.VideoStream, numbers: set[int]
) -> dict[int, av.VideoFrame]:
    """Frames of these numbers; reads no further than the last of them."""
    frames = itertools.islice(decodable_frames(container, stream), max(numbers) + 1)
    return {number: frame for number, frame in enumerate(frames) if number in numbers}


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


def _frame_rate_pyav(data: bytes) -> float:
    with _open_pyav(data) as (_, stream):
        return frame_rate(stream)


# In order of preference, but for layered videos (`first_usable`). decord is unmaintained since 2022
# and contains FFmpeg 4.1.
DECODERS: dict[str, Callable[[bytes, np.ndarray], np.ndarray]] = {
    "torchcodec": decode_torchcodec,
    "pyav": decode_pyav,
    "decord": decode_decord,
}
_COUNTERS: dict[str, Callable[[bytes], int]] = {
    "torchcodec": _count_torchcodec,
    "pyav": _count_pyav,
    "decord": _count_decord,
}
# Where they work, these must read a video before it becomes a sample.
_DECISIVE = ("torchcodec", "pyav")
HOW_TO_GET_TORCHCODEC = (
    "torchcodec, faster where shards have no layers, needs FFmpeg's libraries: apt-get install "
    "ffmpeg, or conda install -c conda-forge ffmpeg"
)
# decord's messages begin with the time and a path: equal errors must have equal messages.
_LOG_PREFIX = re.compile(r"^\[\d\d:\d\d:\d\d\] \S+:\d+: ")


def available_decoders() -> dict[str, str]:
    """Name -> first line of the error that the decoder fails with here; empty if it works."""
    return {name: _load_problem(name) for name in DECODERS}


def usable_decoders() -> list[str]:
    return [name for name, problem in available_decoders().items() if not problem]


def decisive_decoders() -> tuple[str, ...]:
    """Decoders that work here and must read a video before it becomes a sample."""
    return tuple(name for name in _DECISIVE if not _load_problem(name))


def choose_decoder(name: str, *, layers: int = 1) -> str:
    """The decoder of this name, or for "auto" the first that works. Errors: `UserError` with the
    reason why it does not work, and those that do."""
    if name == "auto":
        return first_usable([usable_decoders()], layers=layers)
    problem = _load_problem(name)
    if problem:
        raise UserError(
            f"data.decoder={name} does not work here ({problem}). Usable: "
            f"{', '.join(usable_decoders())}, or data.decoder=auto."
        )
    return name


def first_usable(usable: Sequence[Sequence[str]], *, layers: int = 1) -> str:
    """The preferred decoder that works on all ranks; `usable`: the names by rank. For
    layered videos that is PyAV, which alone skips pictures. Else the first rank prints once how to
    get a faster one. Errors: `UserError` if they share none."""
    shared = [name for name in DECODERS if all(name in names for names in usable)]
    if not shared:
        raise UserError(f"no decoder works on every rank: {', '.join(map(str, usable))}.")
    if layers > 1 and "pyav" in shared:
        return "pyav"
    if shared[0] != "torchcodec":
        _note(f"note: videos are decoded by {shared[0]}; {HOW_TO_GET_TORCHCODEC}.")
    return shared[0]


@functools.lru_cache
def _note(text: str) -> None:
    """Print a line once, on the first rank and not in workers."""
    if os.environ.get("RANK", "0") == "0" and multiprocessing.parent_process() is None:
        print(text, file=sys.stderr, flush=True)


def decode(name: str, data: bytes, frames: np.ndarray) -> np.ndarray:
    """Frames F H W 3, uint8. Errors: `DecodeError`, whatever the library raises."""
    return _translated(DECODERS[name], data, frames)


def count_frames(name: str, data: bytes) -> int:
    """The decoder's number of frames. Errors: `DecodeError`."""
    return _translated(_COUNTERS[name], data)


def read_frame_rate(data: bytes) -> float:
    """Nominal frames per second by the header, whatever the decoder. Errors: `DecodeError`."""
    return _translated(_frame_rate_pyav, data)


def load_decoders(names: Iterable[str]) -> None:
    """Import and try decoders, which takes seconds."""
    for name in names:
        _load_problem(name)


def _translated(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except DecodeError:
        raise
    except Exception as error:  # each library raises its own
        message = f"{function.__name__}: {_LOG_PREFIX.sub('', _first_line(error))}"
        raise DecodeError(type(error).__name__, message) from None


@functools.lru_cache
def _load_problem(name: str) -> str:
    """Decode a video of three frames: libraries import lazily, so importing proves little."""
    blank = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8)).reformat(format="yuv420p")
    try:
        video = encode([blank] * 3, rate=Fraction(3), settings=TranscodeSettings())
        DECODERS[name](video, np.array([0, 2]))
    except Exception as error:  # each library raises its own where FFmpeg or a wheel is missing
        return f"{type(error).__name__}: {_first_line(error)}"
    return ""


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
