"""A video of any length as a sliding window of clips, decoded once, in constant memory.

Windows start at frames 0, hop, 2 hop, ... A window samples F frames, one every `stride`, and covers
F x stride frames. The last window is moved to the end of the video: nothing is padded, and unless
the hop is larger than a window, every frame is covered. A video shorter than a window is one
window, sampled as in evaluation. F frames of a clip, h w its size, W windows.
"""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import av
import numpy as np

from arvideo_ds.data.sampling import view_frames
from arvideo_ds.data.transforms import cut, view_crop
from arvideo_ds.decoding.video import Frames, Part, read_frames
from arvideo_ds.shards.ingest import require_complete


@dataclass(frozen=True)
class WindowShape:
    """frames, stride, size (h, w) and sampling of the recipe's section data; hop in frames."""

    frames: int
    stride: int
    hop: int
    size: tuple[int, int]
    sampling: str

    @property
    def span(self) -> int:
        """Frames that a window covers; with this hop, windows touch."""
        return self.frames * self.stride

    @property
    def reach(self) -> int:
        """From a window's first sampled frame to its last."""
        return (self.frames - 1) * self.stride

    @property
    def grid(self) -> int:
        """Every sampled frame number is a multiple of this."""
        return math.gcd(self.hop, self.stride)


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
    frames: Iterable[Any], shape: WindowShape, prepare: Callable[[Any], Any]
) -> Iterator[Window]:
    """Windows in order, each as soon as its last frame is available. Prepares only frames that a
    window may sample, and keeps no more than one window needs."""
    kept: dict[int, Any] = {}
    start = number = 0
    for number, frame in enumerate(frames, start=1):
        last = number - 1
        # Until the first window is complete, the video may be short and need any frame.
        if last <= shape.reach or last % shape.grid == 0:
            kept[last] = prepare(frame)
        if last == start + shape.reach:
            yield _window(start, kept, shape)
            start += shape.hop
        kept.pop(last - shape.reach - shape.grid, None)
    if not number:
        return
    if start == 0:
        numbers = view_frames(number, shape.frames, shape.stride, shape.sampling)
        yield Window(0, number, [kept[int(chosen)] for chosen in numbers])
    elif start - shape.hop + shape.span < number and start < number:
        last = (number - 1) // shape.grid * shape.grid
        yield _window(last - shape.reach, kept, shape)


def _window(start: int, kept: dict[int, Any], shape: WindowShape) -> Window:
    numbers = range(start, start + shape.span, shape.stride)
    return Window(start, start + shape.span, [kept[number] for number in numbers])


def read_windows(
    source: BinaryIO, part: Part | None, shape: WindowShape, *, batch: int
) -> Iterator[np.ndarray | Windows]:
    """Clips of a video (or a part), uint8, up to `batch` x F h w 3 at a time; last its `Windows`.
    Decodes once; memory depends on shape and batch, not on the video's length. Errors:
    `RejectedError`, for a truncated file after the clips of its readable frames."""
    starts, stops, times = array("q"), array("q"), array("d")
    with read_frames(source, part, upright=True) as (info, frames):
        windows = slide(_timed(frames, times, info.fps), shape, lambda frame: _clip(frame, shape))
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


def _timed(frames: Frames, times: array[float], fps: float) -> Frames:
    """The same frames; appends their seconds to `times`."""
    for number, frame in enumerate(frames):
        times.append(number / fps if frame.time is None else frame.time)
        yield frame


def _clip(frame: av.VideoFrame, shape: WindowShape) -> np.ndarray:
    """A frame as in evaluation, 1 h w 3: the largest central box, resized."""
    pixels = frame.to_ndarray(format="rgb24")[None]
    height, width = pixels.shape[1:3]
    crop = view_crop(height, width, shape.size)
    return cut(pixels, crop, shape.size, flip=False).numpy()
