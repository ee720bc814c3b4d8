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

# Start and stop of a part of a video in seconds, counted from its first frame.
Part = tuple[float, float]

# Where the header counts no frames, duration x rate promises some, roughly.
_ROUGH_PROMISE = 0.75
# A part may reach beyond the video's end by this share of its frames, or by one: annotated times
# are rounded. The sample then ends with the video.
_BEYOND_END = 0.1
# The largest frames that are decoded, unless the user says otherwise: 8K.
MAX_PIXELS = 8192 * 4320
_FFMPEG_MOST = 2**31 - 1

# FFmpeg filters that undo a rotation of so many quarter turns (counter-clockwise).
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
    """H.264 made for fast random access. Lengths in pixels, `gop` in frames; 0 keeps the size."""

    short_side: int = 256
    gop: int = 8
    crf: int = 23
    preset: str = "veryfast"


@dataclass
class VideoInfo:
    """What decoding the whole file showed; `num_frames` counts frames that decode."""

    num_frames: int
    promised_frames: int
    fps: float
    width: int
    height: int
    duration_s: float
    codec: str
    rotation: int
    # What the header says, of the whole video; infinite where it says nothing.
    length_s: float = math.inf
    sizes: set[tuple[int, int]] = field(default_factory=set)
    packets: int = 0
    # Those (about one per frame) that the decoder refused, or reported errors in. Decoders conceal
    # such damage; pictures after it stay wrong up to the next key frame.
    damaged_packets: int = 0
    # Packets that an edit list keeps from being shown.
    hidden_packets: int = 0


def probe(source: BinaryIO, part: Part | None = None, *, max_pixels: int = MAX_PIXELS) -> VideoInfo:
    """Decode every frame (of the part) and say what was there.

    Errors: `RejectedError` when nothing decodes, frames have more than `max_pixels`, or the part
    lies beyond the video's end.
    """
    with read_frames(source, part, max_pixels=max_pixels) as (info, frames):
        for _ in frames:
            pass
    require_frames(info, part)
    return info


@contextlib.contextmanager
def read_frames(
    source: BinaryIO,
    part: Part | None = None,
    *,
    upright: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[tuple[VideoInfo, Iterator[av.VideoFrame]]]:
    """Every frame (of the part) that decodes, one at a time, and the facts, which grow with them.

    The file is read as it goes and never held whole. upright: frames as they are to be shown
    (rotation and pixel aspect undone), not as they are stored. max_pixels: of a frame, refused
    before decoding where the header says the size. Errors: `RejectedError`.
    """
    with _open(source) as container:
        stream = _video_stream(container, max_pixels)
        rate = _rate(stream)
        promised = stream.frames or _rough_promise(container, float(rate))
        info = VideoInfo(
            num_frames=0,
            promised_frames=promised if part is None else int((part[1] - part[0]) * rate),
            fps=round(float(rate), 4),
            width=0,
            height=0,
            duration_s=0.0,
            codec=stream.codec_context.name,
            rotation=0,
            length_s=_length_s(container, stream),
        )
        frames = _counted(_frames(container, stream, part, info), info, max_pixels)
        aspect = stream.sample_aspect_ratio
        yield info, _shown(frames, aspect, max_pixels) if upright else frames


def _counted(
    frames: Iterator[av.VideoFrame], info: VideoInfo, max_pixels: int
) -> Iterator[av.VideoFrame]:
    for frame in frames:
        _require_size(frame.width, frame.height, max_pixels)
        info.num_frames += 1
        info.sizes.add((frame.width, frame.height))
        info.rotation = frame.rotation
        info.width, info.height = frame.width, frame.height
        info.duration_s = round(info.num_frames / info.fps, 4)
        yield frame


def require_frames(info: VideoInfo, part: Part | None = None) -> None:
    """Errors: `RejectedError` when nothing decoded, or the part lies beyond the video's end."""
    if part is not None and part[1] > info.length_s:
        _require_within(part, info)
    if not info.num_frames:
        where = "" if part is None else f" from {part[0]:g} to {part[1]:g} s"
        raise RejectedError("no_frames", f"the file opens but not one frame decodes{where}")


def _rough_promise(container: av.container.InputContainer, fps: float) -> int:
    duration_s = (container.duration or 0) / av.time_base
    return math.floor(_ROUGH_PROMISE * duration_s * fps)


def _length_s(container: av.container.InputContainer, stream: av.VideoStream) -> float:
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return container.duration / av.time_base if container.duration else math.inf


def _require_within(part: Part, info: VideoInfo) -> None:
    """A part that stops after the video's end; hardly after it, no frame behind is promised."""
    lost = info.promised_frames - info.num_frames
    if lost > max(1, _BEYOND_END * info.promised_frames):
        where = f"the part is {part[0]:g} to {part[1]:g} s of a video of {info.length_s:.2f} s"
        raise RejectedError("past_end", where)
    info.promised_frames = info.num_frames


def transcode(
    source: BinaryIO,
    settings: TranscodeSettings,
    part: Part | None = None,
    *,
    max_pixels: int = MAX_PIXELS,
) -> bytes:
    """H.264/MP4: upright, square pixels, even sizes, 8-bit 4:2:0, short closed GOPs, no audio.

    Errors: `RejectedError`, also where frames have more than `max_pixels`, before or after.
    """
    with _open(source) as container:
        stream = _video_stream(container, max_pixels)
        aspect = stream.sample_aspect_ratio or Fraction(1)
        frames = _frames(container, stream, part)
        upright = _upright(frames, aspect, settings.short_side, max_pixels)
        return encode(upright, rate=_rate(stream), settings=settings)


def encode(
    frames: Iterable[av.VideoFrame], *, rate: Fraction, settings: TranscodeSettings
) -> bytes:
    """Encode frames of one even size as H.264/MP4; the same frames give the same bytes."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as output:
        stream: Any = None
        for index, frame in enumerate(frames):
            if stream is None:
                stream = output.add_stream("libx264", rate=rate, options=_x264_options(settings))
                stream.width, stream.height = frame.width, frame.height
                stream.pix_fmt = "yuv420p"
                stream.codec_context.thread_count = 1
                stream.codec_context.time_base = 1 / rate
            # One frame after another at the nominal rate: indices are what training samples by.
            frame.pts, frame.time_base = index, 1 / rate
            output.mux(stream.encode(frame))
        if stream is None:
            raise RejectedError("no_frames", "nothing to encode")
        output.mux(stream.encode(None))
    return buffer.getvalue()


def _x264_options(settings: TranscodeSettings) -> dict[str, str]:
    return {
        "preset": settings.preset,
        "tune": "fastdecode",
        "crf": str(settings.crf),
        "g": str(settings.gop),
        "bf": "0",
        # Looking ahead makes x264's output vary from run to run on small frames.
        "rc-lookahead": "0",
        "mbtree": "0",
        "flags": "+cgop+bitexact",
    }


def open_video(source: BinaryIO) -> av.container.InputContainer:
    """Open a file object to read; every reader of the project opens through this.

    Errors: PyAV's own.
    """
    # No protocols: a crafted playlist cannot reach other files or hosts. Titles and other texts
    # need not be UTF-8 for the pictures to be sound.
    return av.open(source, "r", options={"protocol_whitelist": "none"}, metadata_errors="replace")


def _open(source: BinaryIO) -> av.container.InputContainer:
    try:
        return open_video(source)
    except (av.error.FFmpegError, ValueError, EOFError) as error:
        raise RejectedError("cannot_open", _tool_message(error)) from None


def _tool_message(error: Exception) -> str:
    # Without the path that PyAV adds: rejects must not depend on where the videos lie.
    return str(getattr(error, "strerror", None) or error)


def _rate(stream: av.VideoStream) -> Fraction:
    return stream.average_rate or stream.guessed_rate or Fraction(25)


def _require_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise RejectedError(
            "too_large",
            f"frames of {width} x {height} pixels; the limit is {max_pixels:,} "
            "(make_shards.py --max_pixels)",
        )


def _video_stream(
    container: av.container.InputContainer, max_pixels: int = MAX_PIXELS
) -> av.VideoStream:
    pictures = av.stream.Disposition.attached_pic
    streams = [s for s in container.streams.video if not s.disposition & pictures]
    if not streams:
        raise RejectedError("no_video_stream", "the file has no video stream")
    stream = streams[0]
    if stream.codec_context is None:
        raise RejectedError("no_decoder", "no decoder for the video stream")
    _require_size(stream.codec_context.width, stream.codec_context.height, max_pixels)
    # For what the header hides. Twice, because decoders round sizes up to whole blocks.
    stream.codec_context.options = {"max_pixels": str(min(2 * max_pixels, _FFMPEG_MOST))}
    stream.codec_context.thread_count = 1
    return stream


def _frames(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    part: Part | None,
    info: VideoInfo | None = None,
) -> Iterator[av.VideoFrame]:
    """Every frame (of the part) that decodes, in order of time."""
    if part is None:
        yield from decodable_frames(container, stream, info)
        return
    seek_before(container, stream, part[0])
    for frame in decodable_frames(container, stream, info):
        time = _time(frame, stream)
        if time >= part[1]:
            return
        if time >= part[0]:
            yield frame
        elif info is not None:
            # What is wrong before the part is not the part's.
            info.damaged_packets = 0


def decodable_frames(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    info: VideoInfo | None = None,
) -> Iterator[av.VideoFrame]:
    """Every frame that decodes; damaged packets are counted and passed over.

    Errors: `MemoryError`.
    """
    packets = container.demux(stream)
    while True:
        frames: list[av.VideoFrame] = []
        # Not around the `yield`: messages of an encoder at the other end are not this video's.
        with _error_messages(listen=info is not None) as messages:
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
def _error_messages(*, listen: bool) -> Iterator[list[Any]]:
    """What FFmpeg logs as errors in this thread; the list is complete at the end."""
    if not listen:
        yield []
        return
    level, skip_repeated = av.logging.get_level(), av.logging.get_skip_repeated()
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)
    try:
        with av.logging.Capture(local=True) as messages:
            yield messages
    finally:
        av.logging.set_skip_repeated(skip_repeated)
        av.logging.set_level(level)


def seek_before(
    container: av.container.InputContainer, stream: av.VideoStream, second: float
) -> None:
    """Go to a key frame at or before `second`; to the start where the file cannot say where."""
    assert stream.time_base is not None
    try:
        container.seek(
            (stream.start_time or 0) + int(second / stream.time_base), stream=stream, backward=True
        )
        first = next(decodable_frames(container, stream), None)
        if first is not None and _time(first, stream) <= second:
            container.seek(first.pts or 0, stream=stream, backward=True)
            return
    except av.error.FFmpegError:
        pass
    container.seek(stream.start_time or 0, stream=stream, backward=True)


def _time(frame: av.VideoFrame, stream: av.VideoStream) -> float:
    """Seconds since the first frame of the stream."""
    assert stream.time_base is not None
    return float(((frame.pts or 0) - (stream.start_time or 0)) * stream.time_base)


def _shown(
    frames: Iterator[av.VideoFrame], aspect: Fraction | None, max_pixels: int
) -> Iterator[av.VideoFrame]:
    """Frames as they are to be shown; those that are stored so already pass untouched."""
    first = next(frames, None)
    if first is None:
        return iter(())
    frames = itertools.chain([first], frames)
    if not first.rotation % 360 and (aspect or 1) == 1:
        return frames
    return _upright(frames, aspect or Fraction(1), 0, max_pixels)


def _upright(
    frames: Iterator[av.VideoFrame], pixel_aspect: Fraction, short_side: int, max_pixels: int
) -> Iterator[av.VideoFrame]:
    """Frames rotated as they are to be shown, square-pixelled, scaled, all of one even size."""
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
    width, height = float(frame.width * pixel_aspect), float(frame.height)
    if frame.rotation % 180:
        width, height = height, width
    scale = short_side / min(width, height) if short_side else 1.0
    return _even(width * scale), _even(height * scale)


def _even(length: float) -> int:
    return max(2, 2 * round(length / 2))


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
    scale = ("scale", f"{size[0]}:{size[1]}:flags=bicubic+accurate_rnd+full_chroma_int")
    for name, arguments in (*turns, scale, ("setsar", "1"), ("format", "yuv420p")):
        nodes.append(graph.add(name, arguments) if arguments else graph.add(name))
    nodes.append(graph.add("buffersink"))
    graph.link_nodes(*nodes).configure()
    return graph
