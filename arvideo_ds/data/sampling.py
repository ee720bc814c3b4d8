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


def central_frames(num_frames: int, frames: int, stride: int, sampling: str) -> np.ndarray:
    """Frame numbers of the central clip."""
    if sampling == "uniform":
        return segment_frames(num_frames, frames, np.full(frames, 0.5))
    return dense_frames(num_frames, frames, stride, 0.5)


def dense_frames(num_frames: int, frames: int, stride: int, start: float) -> np.ndarray:
    """`start` in [0, 1) says where, among all starts that fit."""
    fitting = max(1, (num_frames - 1) // max(1, frames - 1))
    stride = min(stride, fitting)
    span = (frames - 1) * stride + 1
    first = int(start * max(1, num_frames - span + 1))
    return np.minimum(first + stride * np.arange(frames), num_frames - 1)


def segment_frames(num_frames: int, frames: int, places: np.ndarray) -> np.ndarray:
    """`places` in [0, 1) say where in each segment."""
    edges = np.arange(frames) + places
    return np.minimum((edges * num_frames / frames).astype(np.int64), num_frames - 1)
