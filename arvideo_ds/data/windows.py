"""A video of any length as a sliding window of clips, decoded once, in constant memory.

Windows start at frames 0, hop, 2 hop, ... A window samples F frames, one every `stride`, and covers
F x stride frames. The last window is moved to the end of the video: nothing is padded, and unless
the hop is larger than a window, every frame is covered. A video shorter than a window is one
window, sampled as in evaluation. With data.fps, hop and stride count times at that rate, and each
time takes the nearest frame. F frames of a clip, h w its size, W windows.
"""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, BinaryIO, NamedTuple

import av
import numpy as np

from arvideo_ds.data.sampling import view_frames
from arvideo_ds.data.transforms import cut, view_crop
from arvideo_ds.decoding.video import Frames, Part, read_frames
from arvideo_ds.shards.ingest import require_complete
from arvideo_ds.shards.inputs import Video


@dataclass(frozen=True)
class WindowShape:
    """frames, size (h, w), sampling, fps and test_short_side of the recipe's section data. stride,
    hop: in frames of the video, or at `fps`."""

    frames: int
    stride: int
    hop: int
    size: tuple[int, int]
    sampling: str
    fps: float | None = None
    test_short_side: int | None = None

    @property
    def span(self) -> int:
        """What a window covers; with this hop, windows touch."""
        return self.frames * self.stride

    @property
    def reach(self) -> int:
        """From a window's first sampled time to its last."""
        return (self.frames - 1) * self.stride

    @property
    def grid(self) -> int:
        """Every sampled time is a multiple of this."""
        return math.gcd(self.hop, self.stride)

    def step_at(self, fps: float) -> Fraction:
        """Frames per unit of time in a video of `fps` frames per second."""
        if self.fps is None:
            return Fraction(1)
        return Fraction(str(fps)) / Fraction(str(self.fps))  # 29.97, not the nearest binary number


class Window(NamedTuple):
    """F sampled frames and the range [start, stop) of frames that they cover; `stop` may be after
    the last frame, which is not known yet."""

    start: int
    stop: int
    frames: list[Any]


@dataclass(frozen=True)
class Windows:
    """All windows of a video: W ranges [start, stop) in frames and in seconds. Seconds count from
    the first frame and follow the time stamps, also at a variable rate."""

    num_frames: int
    fps: float
    start_frame: np.ndarray
    stop_frame: np.ndarray
    start_s: np.ndarray
    stop_s: np.ndarray


def slide(
    frames: Iterable[Any],
    shape: WindowShape,
    prepare: Callable[[Any], Any],
    step: Fraction = Fraction(1),
) -> Iterator[Window]:
    """Windows in order, each as soon as its last frame is available. Prepares only frames that a
    window may sample, and keeps no more than one window needs. step: `shape.step_at` the rate."""

    def frame_at(time: int) -> int:
        return math.floor(time * step + Fraction(1, 2))

    def window(start: int) -> Window:
        times = range(start, start + shape.span, shape.stride)
        chosen = [kept[frame_at(time)] for time in times]
        return Window(frame_at(start), frame_at(start + shape.span), chosen)

    kept: dict[int, Any] = {}
    grid = shape.grid * step
    start = number = 0
    for number, frame in enumerate(frames, start=1):
        last = number - 1
        nearest_time = shape.grid * math.floor(last / grid + Fraction(1, 2))
        # Until the first window is complete, the video may be short and need any frame.
        if last <= frame_at(shape.reach) or frame_at(nearest_time) == last:
            kept[last] = prepare(frame)
        while last == frame_at(start + shape.reach):
            yield window(start)
            start += shape.hop
        kept.pop(last - math.ceil(shape.reach * step + grid), None)
    if not number:
        return
    if start == 0:
        numbers = view_frames(number, shape.frames, float(shape.stride * step), shape.sampling)
        yield Window(0, number, [kept[int(chosen)] for chosen in numbers])
    elif frame_at(start - shape.hop + shape.span) < number and frame_at(start) < number:
        # The last time on the grid whose frame exists.
        last = shape.grid * math.ceil((number - Fraction(1, 2)) / grid - 1)
        yield window(last - shape.reach)


def read_windows(
    source: BinaryIO, part: Part | None, shape: WindowShape, *, batch: int
) -> Iterator[np.ndarray | Windows]:
    """Clips of a video (or a part), uint8, up to `batch` x F h w 3 at a time; last its `Windows`.
    Decodes once; memory depends on shape and batch, not on the video's length. Errors:
    `RejectedError`, for a truncated file after the clips of its readable frames."""
    starts, stops, times = array("q"), array("q"), array("d")
    with read_frames(source, part, upright=True) as (info, frames):
        timed, step = _timed(frames, times, info.fps), shape.step_at(info.fps)
        windows = slide(timed, shape, lambda frame: _clip(frame, shape), step)
        while group := list(itertools.islice(windows, batch)):
            starts.extend(window.start for window in group)
            stops.extend(window.stop for window in group)
            yield np.stack([np.concatenate(window.frames) for window in group])
    require_complete(info)
    # The last frame lasts 1 / fps.
    seconds = np.append(np.array(times), times[-1] + 1 / info.fps) - times[0]
    start_frame = np.array(starts, dtype=np.int64)
    stop_frame = np.minimum(np.array(stops, dtype=np.int64), len(times))
    yield Windows(
        num_frames=len(times),
        fps=info.fps,
        start_frame=start_frame,
        stop_frame=stop_frame,
        start_s=seconds[start_frame].round(6),
        stop_s=seconds[stop_frame].round(6),
    )


def windows_of(shape: WindowShape, batch: int, video: Video) -> Iterator[np.ndarray | Windows]:
    """`read_windows` of a listed video. Runs in a decoding process, which imports this module
    alone, not timm or the models."""
    with video.open() as source:
        yield from read_windows(source, video.part, shape, batch=batch)


def _timed(frames: Frames, times: array[float], fps: float) -> Frames:
    """The same frames; appends their seconds to `times`."""
    for number, frame in enumerate(frames):
        times.append(number / fps if frame.time is None else frame.time)
        yield frame


def _clip(frame: av.VideoFrame, shape: WindowShape) -> np.ndarray:
    """A frame as in evaluation, 1 h w 3: the central box, resized."""
    pixels = frame.to_ndarray(format="rgb24")[None]
    height, width = pixels.shape[1:3]
    crop = view_crop(height, width, shape.size, short_side=shape.test_short_side)
    return cut(pixels, crop, shape.size, flip=False).numpy()
