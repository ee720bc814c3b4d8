"""Which frames of a video make a clip."""

from __future__ import annotations

import numpy as np


def train_frames(
    num_frames: int, frames: int, stride: int, sampling: str, generator: np.random.Generator
) -> np.ndarray:
    """Frame numbers of a random clip: int64, `frames` of them, ascending.

    dense: every `stride`-th frame from a uniform start. uniform: the video is cut into `frames`
    equal segments, one uniform frame of each (TSN). A video too short for the stride is sampled
    with the largest stride that fits; one with fewer frames than asked repeats its last frame.
    """
    if sampling == "uniform":
        return segment_frames(num_frames, frames, generator.random(frames))
    return dense_frames(num_frames, frames, stride, generator.random())


def aligned_frames(
    num_frames: int, frames: int, stride: int, tubelet: int, start: float
) -> np.ndarray:
    """Frame numbers of a clip whose tokens are tokens of the whole video; `start` in 0..1.

    The video is its frames 0, stride, 2 stride, ...; a clip is `frames` of them in a row and begins
    at a multiple of `tubelet`, so at frame number stride x tubelet x (the token's time). A video
    with fewer of them repeats its last one; the stride stays.
    """
    sampled = -(-num_frames // stride)
    starts = max(0, sampled - frames) // tubelet + 1
    first = tubelet * min(int(start * starts), starts - 1)
    return stride * np.minimum(first + np.arange(frames), sampled - 1)


def window_frames(num_frames: int, stride: int, window: int) -> np.ndarray:
    """Frame numbers of every window of a video, int64, W x `window`.

    Frames 0, stride, 2 stride, ... in windows that touch; the last repeats its last frame.
    """
    sampled = -(-num_frames // stride)
    places = np.arange(-(-sampled // window) * window)
    return stride * np.minimum(places, sampled - 1).reshape(-1, window)


def view_frames(
    num_frames: int, frames: int, stride: int, sampling: str, view: int = 0, views: int = 1
) -> np.ndarray:
    """Frame numbers of one of several temporal views of a test; a single view is the central clip.

    dense: clips evenly spaced from the first to the last that fits. uniform: the same place of
    every segment, another one for each view. Source: VideoMAE's tests.
    """
    if sampling == "uniform":
        return segment_frames(num_frames, frames, np.full(frames, (view + 0.5) / views))
    return dense_frames(num_frames, frames, stride, view / (views - 1) if views > 1 else 0.5)


def keyframe_frames(num_frames: int, frames: int, stride: int, keyframe: int) -> np.ndarray:
    """Frame numbers of the clip around a keyframe, which is its frame number `frames // 2`.

    Places before the first or after the last frame of the video repeat that frame. Source:
    SlowFast's and VideoMAE's clips of AVA.
    """
    places = keyframe + stride * (np.arange(frames) - frames // 2)
    return places.clip(0, num_frames - 1)


def dense_frames(num_frames: int, frames: int, stride: int, start: float) -> np.ndarray:
    """`start` in 0..1 says where, among all starts that fit; 1 is the last."""
    fitting = max(1, (num_frames - 1) // max(1, frames - 1))
    stride = min(stride, fitting)
    span = (frames - 1) * stride + 1
    starts = max(1, num_frames - span + 1)
    first = min(int(start * starts), starts - 1)
    return np.minimum(first + stride * np.arange(frames), num_frames - 1)


def segment_frames(num_frames: int, frames: int, places: np.ndarray) -> np.ndarray:
    """`places` in [0, 1) say where in each segment."""
    edges = np.arange(frames) + places
    return np.minimum((edges * num_frames / frames).astype(np.int64), num_frames - 1)
