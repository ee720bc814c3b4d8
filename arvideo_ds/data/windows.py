"""A video of any length as a sliding window of clips, decoded once, in memory that does not grow.

Windows start at frames 0, hop, 2 hop, ... A window takes F frames, one every `stride`, and stands
for F x stride frames. The last window is moved to the end of the video, so that nothing is padded
and, unless the hop is larger than a window, every frame is in one. A video too short for a window
is one window, sampled as evaluation samples it.

F frames of a clip, h w its size, W windows.
"""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, Generic, TypeVar

import av
import numpy as np

from arvideo_ds.data.sampling import view_frames
from arvideo_ds.data.transforms import cut, view_crop
from arvideo_ds.decoding.video import Part, read_frames, require_frames
from arvideo_ds.shards.ingest import require_complete

Frame = TypeVar("Frame")
Shown = TypeVar("Shown")


@dataclass(frozen=True)
class WindowShape:
    """frames, stride, size (h, w) and sampling as in the recipe's data section; hop in frames."""

    frames: int
    stride: int
    hop: int
    size: tuple[int, int]
    sampling: str

    @property
    def span(self) -> int:
        """Frames that a window stands for; with this hop, windows touch."""
        return self.frames * self.stride

    @property
    def reach(self) -> int:
        """From a window's first sampled frame to its last."""
        return (self.frames - 1) * self.stride

    @property
    def grid(self) -> int:
        """No window samples a frame whose number is no multiple of this."""
        return math.gcd(self.hop, self.stride)


@dataclass(frozen=True)
class Window(Generic[Shown]):
    """Sampled frames, F of them, and the range [start, stop) of frames that they stand for.

    `stop` may lie after the last frame of the video, which is not known yet.
    """

    start: int
    stop: int
    frames: list[Shown]


@dataclass(frozen=True)
class Windows:
    """What was found once a video is through: W ranges [start, stop) in frames and in seconds.

    Seconds count from the first frame and follow the time stamps, also where the rate varies.
    """

    num_frames: int
    fps: float
    start_frame: np.ndarray
    stop_frame: np.ndarray
    start_s: np.ndarray
    stop_s: np.ndarray


def slide(
    frames: Iterable[Frame], shape: WindowShape, prepare: Callable[[Frame], Shown]
) -> Iterator[Window[Shown]]:
    """Windows in order, each as soon as its last frame is there.

    Only frames that a window may sample are prepared, and not more are kept than a window reaches.
    """
    kept: dict[int, Shown] = {}
    start = number = 0
    for number, frame in enumerate(frames, start=1):
        last = number - 1
        # Until the first window is complete the video may turn out short, and need any frame.
        if last <= shape.reach or last % shape.grid == 0:
            kept[last] = prepare(frame)
        if last == start + shape.reach:
            yield _window(start, kept, shape)
            start += shape.hop
        kept.pop(last - shape.reach - shape.grid, None)
    if not number:
        return
    if start == 0:
        yield _short_window(number, kept, shape)
    elif start - shape.hop + shape.span < number and start < number:
        last = (number - 1) // shape.grid * shape.grid
        yield _window(last - shape.reach, kept, shape)


def _window(start: int, kept: dict[int, Shown], shape: WindowShape) -> Window[Shown]:
    numbers = range(start, start + shape.span, shape.stride)
    return Window(start, start + shape.span, [kept[number] for number in numbers])


def _short_window(num_frames: int, kept: dict[int, Shown], shape: WindowShape) -> Window[Shown]:
    numbers = view_frames(num_frames, shape.frames, shape.stride, shape.sampling)
    return Window(0, num_frames, [kept[int(number)] for number in numbers])


def read_windows(
    source: BinaryIO, part: Part | None, shape: WindowShape, *, batch: int
) -> Iterator[np.ndarray | Windows]:
    """Clips of a video (or a part), uint8, up to `batch` x F h w 3 at a time; last its `Windows`.

    One decode from start to end; memory depends on shape and batch, not on the video's length.
    Errors: `RejectedError`, for a truncated file after the clips of what is there.
    """
    starts, stops, times = array("q"), array("q"), array("d")
    with read_frames(source, part, upright=True) as (info, frames):
        windows = slide(_timed(frames, times, info.fps), shape, lambda frame: _clip(frame, shape))
        while group := list(itertools.islice(windows, batch)):
            starts.extend(window.start for window in group)
            stops.extend(window.stop for window in group)
            yield np.stack([np.concatenate(window.frames) for window in group])
    require_frames(info, part)
    require_complete(info)
    yield _found(starts, stops, times, info.fps)


def _timed(
    frames: Iterator[av.VideoFrame], times: array[float], fps: float
) -> Iterator[av.VideoFrame]:
    """The same frames; their seconds are noted on the way."""
    for number, frame in enumerate(frames):
        times.append(number / fps if frame.time is None else frame.time)
        yield frame


def _clip(frame: av.VideoFrame, shape: WindowShape) -> np.ndarray:
    """A frame as evaluation sees it, 1 h w 3: the largest central box, resized."""
    pixels = frame.to_ndarray(format="rgb24")[None]
    height, width = pixels.shape[1:3]
    crop = view_crop(height, width, shape.size)
    return cut(pixels, crop, shape.size, flip=False).numpy()


def _found(starts: array[int], stops: array[int], times: array[float], fps: float) -> Windows:
    num_frames = len(times)
    # The last frame is shown for the length of one.
    seconds = np.append(np.array(times), times[-1] + 1 / fps) - times[0]
    start_frame = np.array(starts, dtype=np.int64)
    stop_frame = np.minimum(np.array(stops, dtype=np.int64), num_frames)
    return Windows(
        num_frames=num_frames,
        fps=fps,
        start_frame=start_frame,
        stop_frame=stop_frame,
        start_s=seconds[start_frame].round(6),
        stop_s=seconds[stop_frame].round(6),
    )
