"""Pictures of detections: keyframes with their detected boxes and those of the ground truth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from arvideo_ds.data.detection import EvaluationKeyframes
from arvideo_ds.data.keyframes import Keyframe
from arvideo_ds.decoding.decoders import DecodeError
from arvideo_ds.evaluation.detection import DetectionEvaluator, Detections, ScoredBoxes
from arvideo_ds.evaluation.detection_map import ActionRows

_DETECTED, _TRUE = "#ff8c1a", "#27c46b"
_TOP = 3
_INCHES = 4.2


@dataclass(frozen=True)
class KeyframePicture:
    """A keyframe: its picture H W 3 (uint8), its detections and its ground truth."""

    keyframe: Keyframe
    picture: np.ndarray
    detected: ScoredBoxes
    truth: ActionRows | None


def pick_keyframes(
    evaluator: DetectionEvaluator, detections: Detections, count: int
) -> list[KeyframePicture]:
    """Keyframes with boxes, evenly from all that decode, at most `count`."""
    clips = EvaluationKeyframes(evaluator.shards, evaluator.recipe, evaluator.boxes)
    chosen: list[KeyframePicture] = []
    step = max(1, len(clips) // max(1, count))
    for number in range(0, len(clips), step):
        try:
            known, picture = clips.keyframe(number)
        except DecodeError:  # the report already counts it
            continue
        scored = detections.by_keyframe.get(known.keyframe)
        if scored is not None and len(scored.boxes) and len(chosen) < count:
            truth = evaluator.truth.get(known.keyframe)
            chosen.append(KeyframePicture(known.keyframe, picture, scored, truth))
    return chosen


def draw_detections(pictures: list[KeyframePicture], actions: Mapping[int, str]) -> Figure:
    """Keyframes side by side: detected boxes with their three best actions, true ones dashed."""
    columns = min(3, max(1, len(pictures)))
    lines = max(1, -(-len(pictures) // columns))
    figure = Figure(figsize=(_INCHES * columns, 0.75 * _INCHES * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, picture in zip(axes.flat, pictures, strict=False):
        _draw(axis, picture, actions)
    return figure


def _draw(axis: Axes, drawn: KeyframePicture, actions: Mapping[int, str]) -> None:
    height, width = drawn.picture.shape[:2]
    sides = np.array([width, height, width, height])
    axis.imshow(drawn.picture)
    if drawn.truth is not None:
        for box in np.unique(drawn.truth.boxes, axis=0):
            numbers = drawn.truth.actions[(drawn.truth.boxes == box).all(axis=1)].tolist()
            text = "\n".join(actions.get(a, f"action {a}") for a in sorted(numbers))
            _box(axis, box * sides, text, _TRUE, below=True)
    for box, scores in zip(drawn.detected.boxes, drawn.detected.scores, strict=True):
        best = sorted(actions, key=lambda action: -scores[action - 1])[:_TOP]
        text = "\n".join(f"{actions[a]} {scores[a - 1]:.2f}" for a in best)
        _box(axis, box * sides, text, _DETECTED, below=False)
    film, second = drawn.keyframe
    axis.set_title(f"{film} {second:04d}", fontsize=8)


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
