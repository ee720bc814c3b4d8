"""Probe, transcode and encode videos with PyAV, whose wheels bring FFmpeg along."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, BinaryIO

import av
import av.error
import av.filter
import av.logging
import numpy as np

# Start and stop of a part of a video in seconds, counted from its first frame.
Part = tuple[float, float]
Frames = Iterator[av.VideoFrame]
Container = av.container.InputContainer

# Without a frame count in the header, expect at least this share of duration x rate.
_ROUGH_PROMISE = 0.75
# Annotated times are rounded: a part may exceed the video by this share of its frames, or by one.
_BEYOND_END = 0.1
# Default limit of a frame: 8K.
MAX_PIXELS = 8192 * 4320
_FFMPEG_MOST = 2**31 - 1
# x264 has at most 16 B-pictures in a row.
MAX_LAYERS = 17
# Frames per second where a file has no rate, as FFmpeg assumes for pictures.
_DEFAULT_RATE = Fraction(25)

# FFmpeg filters that undo 0 to 3 counter-clockwise quarter turns.
_TURNS: list[list[tuple[str, str | None]]] = [
    [],
    [("transpose", "cclock")],
    [("hflip", None), ("vflip", None)],
    [("transpose", "clock")],
]


class RejectedError(Exception):
    """A video that cannot become a sample: a short reason to count by, and the tool's message."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.reason, self.message = reason, message


@dataclass(frozen=True)
class TranscodeSettings:
    """H.264 with fast random access.

    short_side: pixels, 0 keeps the size. gop: frames between key frames. layers: only every
    `layers`-th picture is referred to by others, so that the rest can be skipped; 1 is all.
    """

    short_side: int = 256
    gop: int = 8
    layers: int = 1
    crf: int = 23
    preset: str = "veryfast"


@dataclass(kw_only=True)
class VideoInfo:
    """Properties of a decoded video (or part); `num_frames` counts the frames that decode."""

    num_frames: int = 0
    promised_frames: int
    fps: float
    width: int = 0
    height: int = 0
    duration_s: float = 0.0
    codec: str
    rotation: int = 0
    # By the header: exact frames per second, and the width of a pixel by its height.
    rate: Fraction
    pixel_aspect: Fraction
    # Number among the file's streams of pictures.
    stream: int = 0
    # Of the whole video by its header; infinite where the header has none.
    length_s: float
    sizes: set[tuple[int, int]] = field(default_factory=set)
    packets: int = 0
    # Packets (about one per frame) with decoder errors: pictures are wrong to the next key frame.
    damaged_packets: int = 0
    # Packets that an edit list hides.
    hidden_packets: int = 0


def probe(source: BinaryIO, part: Part | None = None, *, max_pixels: int = MAX_PIXELS) -> VideoInfo:
    """Decode every frame (of the part). Errors: `RejectedError`, as `read_frames`."""
    with read_frames(source, part, max_pixels=max_pixels) as (info, frames):
        for _ in frames:
            pass
    return info


@contextlib.contextmanager
def read_frames(
    source: BinaryIO,
    part: Part | None = None,
    *,
    upright: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[tuple[VideoInfo, Frames]]:
    """Every frame (of the part) that decodes, and the info, which each frame updates.

    The file is streamed. upright: undo rotation and pixel aspect. max_pixels: limit of a frame,
    checked before decoding where the header has the size. Errors: `RejectedError`, at the end where
    no frame decoded or the part exceeds the video.
    """
    with _open(source) as container:
        stream = _video_stream(container, max_pixels)
        rate = _rate(stream)
        length_s = container.duration / av.time_base if container.duration else 0.0
        promised = stream.frames or math.floor(_ROUGH_PROMISE * length_s * float(rate))
        if stream.duration and stream.time_base:
            length_s = float(stream.duration * stream.time_base)
        info = VideoInfo(
            promised_frames=promised if part is None else int((part[1] - part[0]) * rate),
            fps=frame_rate(stream),
            codec=stream.codec_context.name,
            length_s=length_s or math.inf,
            rate=rate,
            pixel_aspect=stream.sample_aspect_ratio or Fraction(1),
            stream=container.streams.video.index(stream),
        )
        frames = _counted(_frames(container, stream, part, info), info, max_pixels)
        yield info, _shown(frames, info.pixel_aspect, max_pixels) if upright else frames
    if part is not None and part[1] > info.length_s:
        lost = info.promised_frames - info.num_frames
        if lost > max(1, _BEYOND_END * info.promised_frames):
            where = f"the part is {part[0]:g} to {part[1]:g} s of a video of {info.length_s:.2f} s"
            raise RejectedError("past_end", where)
        info.promised_frames = info.num_frames
    if not info.num_frames:
        where = "" if part is None else f" from {part[0]:g} to {part[1]:g} s"
        raise RejectedError("no_frames", f"the file opens but not one frame decodes{where}")


def _counted(frames: Frames, info: VideoInfo, max_pixels: int) -> Frames:
    for frame in frames:
        _require_size(frame.width, frame.height, max_pixels)
        info.num_frames += 1
        info.sizes.add((frame.width, frame.height))
        info.rotation = frame.rotation
        info.width, info.height = frame.width, frame.height
        info.duration_s = round(info.num_frames / info.fps, 4)
        yield frame


def transcode(
    source: BinaryIO,
    settings: TranscodeSettings,
    part: Part | None = None,
    *,
    max_pixels: int = MAX_PIXELS,
) -> tuple[bytes, VideoInfo]:
    """H.264/MP4: upright, square pixels, even sizes, 8-bit 4:2:0, short closed GOPs, no audio; and
    the info of the source, which is decoded once. Errors: as `read_frames`, also for frames of more
    than `max_pixels` after scaling."""
    with read_frames(source, part, max_pixels=max_pixels) as (info, frames):
        upright = _upright(frames, info.pixel_aspect, settings.short_side, max_pixels)
        data = encode(upright, rate=info.rate, settings=settings)
    return data, info


def encode_picture(picture: np.ndarray, settings: TranscodeSettings, *, max_pixels: int) -> bytes:
    """A picture H W 3, uint8, as a video of one frame, otherwise as `transcode`. Errors:
    `RejectedError` for more than `max_pixels` after scaling."""
    frames = iter([av.VideoFrame.from_ndarray(picture)])
    upright = _upright(frames, Fraction(1), settings.short_side, max_pixels)
    return encode(upright, rate=_DEFAULT_RATE, settings=settings)


def encode(
    frames: Iterable[av.VideoFrame], *, rate: Fraction, settings: TranscodeSettings
) -> bytes:
    """Frames of one even size as H.264/MP4; deterministic to the byte."""
    options = {
        "preset": settings.preset,
        "tune": "fastdecode",
        "crf": str(settings.crf),
        "g": str(settings.gop),
        "bf": str(settings.layers - 1),
        # With lookahead, x264's output is not deterministic on small frames.
        "rc-lookahead": "0",
        "mbtree": "0",
        "flags": "+cgop+bitexact",
    }
    if settings.layers > 1:
        # B-pictures at fixed places, none of which others refer to.
        options |= {"b_strategy": "0", "b-pyramid": "none", "sc_threshold": "0"}
        options["keyint_min"] = str(settings.gop)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as output:
        stream: Any = None
        for index, frame in enumerate(frames):
            if stream is None:
                stream = output.add_stream("libx264", rate=rate, options=options)
                stream.width, stream.height = frame.width, frame.height
                stream.pix_fmt = "yuv420p"
                stream.codec_context.thread_count = 1
                stream.codec_context.time_base = 1 / rate
            # Times follow the frame numbers at the nominal rate: training samples by numbers.
            frame.pts, frame.time_base = index, 1 / rate
            if settings.layers > 1:
                # x264 would keep the types of the source's pictures.
                frame.pict_type = av.video.frame.PictureType.NONE
            output.mux(stream.encode(frame))
        if stream is None:
            raise RejectedError("no_frames", "nothing to encode")
        output.mux(stream.encode(None))
    return buffer.getvalue()


def open_video(source: BinaryIO) -> Container:
    """Open a file object to read; the only call of `av.open` for reading. Errors: PyAV's."""
    # No protocols: a crafted playlist cannot reach other files or hosts. Titles need not be UTF-8.
    return av.open(source, "r", options={"protocol_whitelist": "none"}, metadata_errors="replace")


def _open(source: BinaryIO) -> Container:
    try:
        return open_video(source)
    except (av.error.FFmpegError, ValueError, EOFError) as error:
        # Without the path that PyAV adds: rejects must not depend on the folder of the videos.
        message = str(getattr(error, "strerror", None) or error)
        raise RejectedError("cannot_open", message) from None


def frame_rate(stream: av.VideoStream) -> float:
    """Nominal frames per second, as in the facts of samples."""
    return round(float(_rate(stream)), 4)


def _rate(stream: av.VideoStream) -> Fraction:
    return stream.average_rate or stream.guessed_rate or _DEFAULT_RATE


def _require_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        what = f"frames of {width} x {height} pixels; the limit is {max_pixels:,}"
        raise RejectedError("too_large", f"{what} (make_shards.py --max_pixels)")


def _video_stream(container: Container, max_pixels: int) -> av.VideoStream:
    pictures = av.stream.Disposition.attached_pic
    streams = [s for s in container.streams.video if not s.disposition & pictures]
    if not streams:
        raise RejectedError("no_video_stream", "the file has no video stream")
    stream = streams[0]
    if stream.codec_context is None:
        raise RejectedError("no_decoder", "no decoder for the video stream")
    _require_size(stream.codec_context.width, stream.codec_context.height, max_pixels)
    # For frames larger than the header says. Twice, since decoders round up to whole blocks.
    stream.codec_context.options = {"max_pixels": str(min(2 * max_pixels, _FFMPEG_MOST))}
    stream.codec_context.thread_count = 1
    return stream


def _frames(
    container: Container, stream: av.VideoStream, part: Part | None, info: VideoInfo | None = None
) -> Frames:
    if part is None:
        yield from decodable_frames(container, stream, info)
        return
    _seek_before(container, stream, part[0])
    for frame in decodable_frames(container, stream, info):
        time = _time(frame, stream)
        if time >= part[1]:
            return
        if time >= part[0]:
            yield frame
        elif info is not None:
            # Damage before the part does not count.
            info.damaged_packets = 0


def decodable_frames(
    container: Container, stream: av.VideoStream, info: VideoInfo | None = None
) -> Frames:
    """Every frame that decodes; `info` counts packets. Errors: `MemoryError`."""
    packets = container.demux(stream)
    while True:
        frames: list[av.VideoFrame] = []
        # Not around the `yield`: messages of an encoder in the caller are not this video's.
        with _error_messages() if info else contextlib.nullcontext() as messages:
            try:
                packet = next(packets)
                if info is not None and packet.size:
                    info.packets += 1
                    info.hidden_packets += packet.is_discard
                frames = packet.decode()
                damaged = packet.is_corrupt or any(frame.is_corrupt for frame in frames)
            except (StopIteration, av.error.EOFError):
                return
            except MemoryError:
                raise
            except av.error.FFmpegError:
                damaged = True
        if info is not None:
            info.damaged_packets += damaged or bool(messages)
        yield from frames


@contextlib.contextmanager
def _error_messages() -> Iterator[list[Any]]:
    """FFmpeg's error messages in this thread; the list is complete at the end."""
    level, skip_repeated = av.logging.get_level(), av.logging.get_skip_repeated()
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)
    try:
        with av.logging.Capture(local=True) as messages:
            yield messages
    finally:
        av.logging.set_skip_repeated(skip_repeated)
        av.logging.set_level(level)


def _seek_before(container: Container, stream: av.VideoStream, second: float) -> None:
    """Seek to a key frame at or before `second`, or to the start where that fails."""
    assert stream.time_base is not None
    start = stream.start_time or 0
    try:
        container.seek(start + int(second / stream.time_base), stream=stream, backward=True)
        first = next(decodable_frames(container, stream), None)
        if first is not None and _time(first, stream) <= second:
            container.seek(first.pts or 0, stream=stream, backward=True)
            return
    except av.error.FFmpegError:
        pass
    container.seek(start, stream=stream, backward=True)


def _time(frame: av.VideoFrame, stream: av.VideoStream) -> float:
    """Seconds since the first frame of the stream."""
    assert stream.time_base is not None
    return float(((frame.pts or 0) - (stream.start_time or 0)) * stream.time_base)


def _shown(frames: Frames, aspect: Fraction, max_pixels: int) -> Frames:
    """Frames upright with square pixels; untouched if they already are."""
    first = next(frames, None)
    if first is None:
        return iter(())
    frames = itertools.chain([first], frames)
    if not first.rotation % 360 and aspect == 1:
        return frames
    return _upright(frames, aspect, 0, max_pixels)


def _upright(frames: Frames, pixel_aspect: Fraction, short_side: int, max_pixels: int) -> Frames:
    """Frames upright, with square pixels, scaled to one even size."""
    size: tuple[int, int] | None = None
    graph: Any = None
    shape: tuple[Any, ...] = ()
    for frame in frames:
        now = (frame.width, frame.height, frame.format.name, frame.rotation)
        if now != shape:
            size = size or _target_size(frame, pixel_aspect, short_side)
            _require_size(*size, max_pixels)
            graph, shape = _graph(frame, size), now
        graph.push(frame)
        yield graph.pull()


def _target_size(frame: av.VideoFrame, pixel_aspect: Fraction, short_side: int) -> tuple[int, int]:
    sides = [float(frame.width * pixel_aspect), float(frame.height)]
    if frame.rotation % 180:
        sides.reverse()
    scale = short_side / min(sides) if short_side else 1.0
    width, height = (max(2, 2 * round(side * scale / 2)) for side in sides)
    return width, height


def _graph(frame: av.VideoFrame, size: tuple[int, int]) -> av.filter.Graph:
    turns = _TURNS[round(frame.rotation / 90) % 4]
    graph = av.filter.Graph()
    nodes: list[Any] = [
        graph.add_buffer(
            width=frame.width,
            height=frame.height,
            format=frame.format,
            time_base=frame.time_base or Fraction(1, 1000),
        )
    ]
    # The range that decoders assume, as the encoder does not name one.
    options = "out_range=tv:flags=bicubic+accurate_rnd+full_chroma_int"
    scale = ("scale", f"{size[0]}:{size[1]}:{options}")
    filters = (*turns, scale, ("setsar", "1"), ("format", "yuv420p"), ("buffersink", None))
    nodes += [graph.add(name, arguments) for name, arguments in filters]
    graph.link_nodes(*nodes).configure()
    return graph
