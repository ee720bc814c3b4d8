"""Probe, transcode and encode videos with PyAV, whose wheels bring FFmpeg along.

`ingest` runs in a process of its own (see shard_writer): a decoder that crashes or hangs takes
nothing with it.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.error
import av.filter

# A file of which less than this share of the promised frames decodes is called truncated. Where the
# header counts no frames, duration x rate promises some, roughly.
MIN_DECODABLE = 0.9
_ROUGH_PROMISE = 0.75


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
    sizes: set[tuple[int, int]] = field(default_factory=set)
    damaged_packets: int = 0


@dataclass(frozen=True)
class Sample:
    """A video ready for a shard."""

    video: bytes
    suffix: str
    facts: dict[str, Any]


def ingest(path: Path, transcode_settings: TranscodeSettings | None) -> Sample:
    """Read, probe and, where settings are given, transcode one file.

    Errors: `RejectedError` with the reason a user can count by.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RejectedError("unreadable", str(error)) from None
    if not data:
        raise RejectedError("empty", "the file has 0 bytes")
    info = probe(data)
    _require_usable(info, copied=transcode_settings is None)
    suffix = path.suffix.lower().removeprefix(".")
    if transcode_settings is not None:
        data, suffix = transcode(data, transcode_settings), "mp4"
        info = probe(data)
    facts = asdict(info)
    for internal in ("sizes", "promised_frames", "damaged_packets", "rotation"):
        del facts[internal]
    facts["bytes"] = len(data)
    facts["sha256"] = hashlib.sha256(data).hexdigest()
    return Sample(video=data, suffix=suffix, facts=facts)


def probe(data: bytes) -> VideoInfo:
    """Decode every frame and say what was there. Errors: `RejectedError` when nothing decodes."""
    with _open(data) as container:
        stream = _video_stream(container)
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        info = VideoInfo(
            num_frames=0,
            promised_frames=stream.frames or _rough_promise(container, float(rate)),
            fps=round(float(rate), 4),
            width=0,
            height=0,
            duration_s=0.0,
            codec=stream.codec_context.name,
            rotation=0,
        )
        for frame in _frames(container, stream, info):
            info.num_frames += 1
            info.sizes.add((frame.width, frame.height))
            info.rotation = frame.rotation
            info.width, info.height = frame.width, frame.height
    if not info.num_frames:
        raise RejectedError("no_frames", "the file opens but not one frame decodes")
    info.duration_s = round(info.num_frames / info.fps, 4)
    return info


def _rough_promise(container: av.container.InputContainer, fps: float) -> int:
    duration_s = (container.duration or 0) / av.time_base
    return math.floor(_ROUGH_PROMISE * duration_s * fps)


def transcode(data: bytes, settings: TranscodeSettings) -> bytes:
    """H.264/MP4: upright, square pixels, even sizes, 8-bit 4:2:0, short closed GOPs, no audio."""
    with _open(data) as container:
        stream = _video_stream(container)
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        aspect = stream.sample_aspect_ratio or Fraction(1)
        upright = _upright(_frames(container, stream, None), aspect, settings.short_side)
        return encode(upright, rate=rate, settings=settings)


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


def _open(data: bytes) -> av.container.InputContainer:
    # Bytes and an empty protocol list: a crafted playlist cannot reach other files or hosts.
    try:
        return av.open(io.BytesIO(data), "r", options={"protocol_whitelist": "none"})
    except (av.error.FFmpegError, ValueError, EOFError) as error:
        raise RejectedError("cannot_open", str(error)) from None


def _video_stream(container: av.container.InputContainer) -> av.VideoStream:
    pictures = av.stream.Disposition.attached_pic
    streams = [s for s in container.streams.video if not s.disposition & pictures]
    if not streams:
        raise RejectedError("no_video_stream", "the file has no video stream")
    stream = streams[0]
    if stream.codec_context is None:
        raise RejectedError("no_decoder", "no decoder for the video stream")
    stream.codec_context.thread_count = 1
    return stream


def _frames(
    container: av.container.InputContainer, stream: av.VideoStream, info: VideoInfo | None
) -> Iterator[av.VideoFrame]:
    """Every frame that decodes; damaged packets are counted and passed over."""
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
            yield from packet.decode()
        except StopIteration:
            return
        except av.error.EOFError:
            return
        except av.error.FFmpegError:
            if info is None:
                continue
            info.damaged_packets += 1


def _require_usable(info: VideoInfo, *, copied: bool) -> None:
    if info.num_frames < MIN_DECODABLE * info.promised_frames:
        raise RejectedError(
            "truncated", f"{info.num_frames} of {info.promised_frames} promised frames decode"
        )
    if copied and len(info.sizes) > 1:
        raise RejectedError(
            "size_changes", f"frames of {sorted(info.sizes)}; use --video transcode"
        )
    if copied and info.rotation:
        raise RejectedError(
            "rotated", f"shown rotated by {info.rotation} degrees; use --video transcode"
        )


def _upright(
    frames: Iterator[av.VideoFrame], pixel_aspect: Fraction, short_side: int
) -> Iterator[av.VideoFrame]:
    """Frames rotated as they are to be shown, square-pixelled, scaled, all of one even size."""
    size: tuple[int, int] | None = None
    graph: Any = None
    shape: tuple[Any, ...] = ()
    for frame in frames:
        now = (frame.width, frame.height, frame.format.name, frame.rotation)
        if now != shape:
            size = size or _target_size(frame, pixel_aspect, short_side)
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
