"""Which frames of a video make a clip.

A stride is the number of frames from one of a clip to the next. It is not whole where data.fps does
not divide the video's rate; the clip then has the frames nearest to the times.
"""

from __future__ import annotations

import numpy as np


def train_frames(
    num_frames: int,
    frames: int,
    stride: float,
    sampling: str,
    generator: np.random.Generator,
    layers: int = 1,
    part: tuple[int, int] = (0, 1),
) -> np.ndarray:
    """Frame numbers of a random clip: int64, `frames` of them, ascending.

    dense: every `stride`-th frame from a uniform start. uniform: one uniform frame of each of
    `frames` equal segments (TSN). A video too short for the stride takes the largest whole one that
    fits; one with fewer than `frames` frames repeats its last. layers: of the shards; where they
    divide the distances, all frames are multiples of it. part: (i, n) draws from part i of
    n equal parts of all starts, or of each segment.
    """
    number, count = part
    if sampling == "uniform":
        return segment_frames(num_frames, frames, (number + generator.random(frames)) / count)
    return dense_frames(num_frames, frames, stride, (number + generator.random()) / count, layers)


def aligned_frames(
    num_frames: int, frames: int, stride: int, tubelet: int, start: float
) -> np.ndarray:
    """Frame numbers of a clip whose tokens are tokens of the whole video; `start` in 0..1.

    Of the video's frames 0, stride, 2 stride, ... the clip has `frames` in a row, from a multiple
    of `tubelet`: frame number stride x tubelet x (the token's time). A shorter video repeats its
    last one; the stride stays.
    """
    sampled = -(-num_frames // stride)
    starts = max(0, sampled - frames) // tubelet + 1
    first = tubelet * min(int(start * starts), starts - 1)
    return stride * np.minimum(first + np.arange(frames), sampled - 1)


def window_frames(num_frames: int, stride: int, window: int) -> np.ndarray:
    """Frame numbers of every window of a video, int64, W x `window`. Frames 0, stride, 2 stride,
    ... in adjacent windows; the last repeats its last frame."""
    sampled = -(-num_frames // stride)
    places = np.arange(-(-sampled // window) * window)
    return stride * np.minimum(places, sampled - 1).reshape(-1, window)


def view_frames(
    num_frames: int, frames: int, stride: float, sampling: str, view: int = 0, views: int = 1
) -> np.ndarray:
    """Frame numbers of one of several temporal test views; a single view is the central clip.
    dense: clips evenly spaced from the first to the last that fits. uniform: the same place in each
    segment, which differs between views. Source: VideoMAE's tests."""
    if sampling == "uniform":
        return segment_frames(num_frames, frames, np.full(frames, (view + 0.5) / views))
    return dense_frames(num_frames, frames, stride, view / (views - 1) if views > 1 else 0.5)


def keyframe_frames(num_frames: int, frames: int, stride: float, keyframe: int) -> np.ndarray:
    """Frame numbers of the clip whose frame `frames // 2` is the keyframe. Beyond the video's ends,
    the first or last frame is repeated. Source: SlowFast's and VideoMAE's clips of AVA."""
    places = keyframe + nearest(stride * (np.arange(frames) - frames // 2))
    return places.clip(0, num_frames - 1)


def dense_frames(
    num_frames: int, frames: int, stride: float, start: float, layers: int = 1
) -> np.ndarray:
    """`start` in 0..1 is the place among all starts that fit; 1 is the last. layers: as above."""
    fitting = max(1, (num_frames - 1) // max(1, frames - 1))
    stride = min(stride, fitting)
    places = nearest(stride * np.arange(frames + 1))
    step = 1 if (places % layers).any() else layers  # also of 29.97 fps at 7.5
    places = places[:-1]
    starts = max(0, num_frames - 1 - int(places[-1])) // step + 1
    first = step * min(int(start * starts), starts - 1)
    return np.minimum(first + places, num_frames - 1)


def segment_frames(num_frames: int, frames: int, places: np.ndarray) -> np.ndarray:
    """`places` in [0, 1) are the places within the segments."""
    edges = np.arange(frames) + places
    return np.minimum((edges * num_frames / frames).astype(np.int64), num_frames - 1)


def nearest(places: np.ndarray) -> np.ndarray:
    """The whole numbers nearest to `places`, halves upwards, int64."""
    return np.floor(places + 0.5).astype(np.int64)
