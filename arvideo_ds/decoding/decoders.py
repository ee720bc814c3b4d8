"""Frames of a video by their numbers, from bytes, through whichever decoder this machine has.

A decoder is a function (bytes, frame numbers) -> uint8 array F H W 3. All of them return the same
frames for the same numbers, up to the rounding of colours; a contract test holds them to it. Each
call opens, reads and closes: cached readers are what makes workers grow.
"""

from __future__ import annotations

import contextlib
import functools
import io
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    """From the key frame before the first frame wanted where times number the frames, as in
    transcoded videos; else from the start: exact on any file, slow on long ones."""
    wanted = set(frames.tolist())
    with _open_pyav(data) as (container, stream):
        found = _after_key_frame(container, stream, wanted)
    if len(found) < len(wanted):
        with _open_pyav(data) as (container, stream):
            found = _chosen(enumerate(decodable_frames(container, stream)), wanted)
    missing = sorted(wanted - found.keys())
    if missing:
        raise DecodeError("short", f"frame {missing[0]} is not there")
    return np.stack([found[number] for number in frames.tolist()])


def _after_key_frame(
    container: av.container.InputContainer, stream: av.VideoStream, wanted: set[int]
) -> dict[int, np.ndarray]:
    """The wanted frames, or fewer where the times of the packets do not number the frames."""
    # With B-frames, pictures after a key frame may need some from before it.
    if stream.codec_context.name != "h264" or stream.codec_context.has_b_frames:
        return {}
    times: list[int] = []
    for packet in container.demux(stream):
        if packet.size:
            if packet.pts is None or packet.is_discard or packet.is_corrupt:
                return {}
            times.append(packet.pts)
    times.sort()
    if max(wanted) >= len(times) or len(set(np.diff(times))) > 1:
        return {}
    numbers = {time: number for number, time in enumerate(times)}
    try:
        container.seek(times[min(wanted)], stream=stream, backward=True)
    except av.error.FFmpegError:
        return {}
    decoded = decodable_frames(container, stream)
    numbered = ((numbers[frame.pts], frame) for frame in decoded if frame.pts in numbers)
    return _chosen(numbered, wanted)


def _chosen(
    numbered: Iterable[tuple[int, av.VideoFrame]], wanted: set[int]
) -> dict[int, np.ndarray]:
    """The wanted ones of numbered frames; reads no further than the last of them."""
    found: dict[int, np.ndarray] = {}
    for number, frame in numbered:
        if number in wanted:
            found[number] = frame.to_ndarray(format="rgb24")
        if len(found) == len(wanted) or number > max(wanted):
            break
    return found


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


# In order of preference. decord is the last: unmaintained since 2022, with FFmpeg 4.1 inside.
DECODERS: dict[str, Decoder] = {
    "torchcodec": decode_torchcodec,
    "pyav": decode_pyav,
    "decord": decode_decord,
}
_COUNTERS: dict[str, Callable[[bytes], int]] = {
    "torchcodec": _count_torchcodec,
    "pyav": _count_pyav,
    "decord": _count_decord,
}
# Those that must read a video before it becomes a sample, where they work.
_DECISIVE = ("torchcodec", "pyav")
HOW_TO_GET_TORCHCODEC = (
    "torchcodec, the fastest decoder, needs FFmpeg's libraries: apt-get install ffmpeg, or conda "
    "install -c conda-forge ffmpeg"
)
# decord begins its messages with the time and a path: the same fault must read the same.
_LOG_PREFIX = re.compile(r"^\[\d\d:\d\d:\d\d\] \S+:\d+: ")


def available_decoders() -> dict[str, str]:
    """Name -> empty text if it works here, else the first line of why not."""
    return {name: _load_problem(name) for name in DECODERS}


def decisive_decoders() -> tuple[str, ...]:
    """Those that work here and must read a video before it becomes a sample."""
    return tuple(name for name in _DECISIVE if not _load_problem(name))


def choose_decoder(name: str) -> str:
    """The decoder asked for, or for "auto" the first that works.

    Errors: `UserError` when it does not work; the message has its reason and the ones that do.
    """
    if name == "auto":
        return first_usable([usable_decoders()])
    problem = _load_problem(name)
    if problem:
        raise UserError(
            f"data.decoder={name} does not work here ({problem}). Usable: "
            f"{', '.join(usable_decoders())}, or data.decoder=auto."
        )
    return name


def usable_decoders() -> list[str]:
    return [name for name, problem in available_decoders().items() if not problem]


def first_usable(usable: Sequence[Sequence[str]]) -> str:
    """The decoder that "auto" takes where each of several machines can use these.

    The first rank says once how to get a faster one. Errors: `UserError` where they share none.
    """
    shared = [name for name in DECODERS if all(name in names for names in usable)]
    if not shared:
        raise UserError(f"no decoder works on every rank: {', '.join(map(str, usable))}.")
    if shared[0] != "torchcodec":
        _note(f"note: videos are decoded by {shared[0]}; {HOW_TO_GET_TORCHCODEC}.")
    return shared[0]


@functools.lru_cache
def _note(text: str) -> None:
    """Print a line once, and not on every rank and in every worker."""
    if os.environ.get("RANK", "0") == "0" and multiprocessing.parent_process() is None:
        print(text, file=sys.stderr, flush=True)


def decode(name: str, data: bytes, frames: np.ndarray) -> np.ndarray:
    """Frames F H W 3, uint8. Errors: `DecodeError`, whatever the library raised."""
    return _translated(DECODERS[name], data, frames)


def count_frames(name: str, data: bytes) -> int:
    """Frames that this decoder says there are. Errors: `DecodeError`."""
    return _translated(_COUNTERS[name], data)


def load_decoders(names: Iterable[str]) -> None:
    """Import and try decoders now: it takes seconds."""
    for name in names:
        _load_problem(name)


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
