"""Pictures of detections: keyframes with their boxes, what was found in each, and what is true."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from arvideo_ds.data.detection import EvaluationKeyframes
from arvideo_ds.data.keyframes import Keyframe
from arvideo_ds.decoding.decoders import DecodeError
from arvideo_ds.evaluation.detection import Found, Judge, Scored
from arvideo_ds.evaluation.detection_map import Rows

_FOUND, _TRUE = "#ff8c1a", "#27c46b"
_TOP = 3
_INCHES = 4.2


@dataclass(frozen=True)
class Pictured:
    """A keyframe: its picture H W 3 (uint8), what was found there and what is true."""

    keyframe: Keyframe
    picture: np.ndarray
    found: Scored
    truth: Rows | None


def pick_keyframes(judge: Judge, found: Found, count: int) -> list[Pictured]:
    """Keyframes with boxes, evenly from all that decode, at most `count`."""
    clips = EvaluationKeyframes(judge.shards, judge.recipe, judge.boxes)
    chosen: list[Pictured] = []
    step = max(1, len(clips) // max(1, count))
    for number in range(0, len(clips), step):
        try:
            known, picture = clips.keyframe(number)
        except DecodeError:  # the report already counts it
            continue
        scored = found.scored.get(known.keyframe)
        if scored is not None and len(scored.boxes) and len(chosen) < count:
            truth = judge.truth.get(known.keyframe)
            chosen.append(Pictured(known.keyframe, picture, scored, truth))
    return chosen


def draw_detections(pictured: list[Pictured], actions: Mapping[int, str]) -> Figure:
    """Keyframes beside each other: found boxes with their three best actions, true ones dashed."""
    columns = min(3, max(1, len(pictured)))
    lines = max(1, -(-len(pictured) // columns))
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(_INCHES * columns, 0.75 * _INCHES * lines),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, own in zip(axes.flat, pictured, strict=False):
        _draw(axis, own, actions)
    return figure


def _draw(axis: Axes, own: Pictured, actions: Mapping[int, str]) -> None:
    height, width = own.picture.shape[:2]
    sides = np.array([width, height, width, height])
    axis.imshow(own.picture)
    truth = own.truth
    for box in np.unique(truth.boxes, axis=0) if truth is not None else ():
        labels = [actions.get(a, f"action {a}") for a in _actions_of(truth, box)]
        _box(axis, box * sides, "\n".join(labels), _TRUE, below=True)
    for box, scores in zip(own.found.boxes, own.found.scores, strict=True):
        best = sorted(actions, key=lambda action: -scores[action - 1])[:_TOP]
        text = "\n".join(f"{actions[a]} {scores[a - 1]:.2f}" for a in best)
        _box(axis, box * sides, text, _FOUND, below=False)
    film, second = own.keyframe
    axis.set_title(f"{film} {second:04d}", fontsize=8)


def _actions_of(truth: Rows | None, box: np.ndarray) -> list[int]:
    assert truth is not None
    return sorted(truth.actions[(truth.boxes == box).all(axis=1)].tolist())


def _box(axis: Axes, box: np.ndarray, text: str, colour: str, *, below: bool) -> None:
    left, top, right, bottom = box
    style = "--" if below else "-"
    axis.add_patch(
        Rectangle((left, top), right - left, bottom - top, fill=False, ec=colour, ls=style, lw=1.8)
    )
    axis.text(
        left,
        bottom if below else top,
        text,
        color="black",
        fontsize=6,
        va="bottom" if below else "top",
        clip_on=True,
        bbox={"facecolor": colour, "edgecolor": "none", "pad": 1, "alpha": 0.75},
    )
