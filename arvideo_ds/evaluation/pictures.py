"""Figures of a run: loss, probes, a confusion matrix, and a clip predicted cluster by cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from matplotlib.figure import Figure
from torch import Tensor

from arvideo_ds.config import PretrainRecipe
from arvideo_ds.evaluation.probes import PROBES, probe_names
from arvideo_ds.geometry import CHANNELS
from arvideo_ds.models.cubes import from_cubes, pick, target_statistics, to_cubes, unit_pixels
from arvideo_ds.models.objective import Objective

# Grey of missing tokens.
BLANK = 0.82
MAX_STEPS, _MAX_COLUMNS = 8, 8
_OUTLINE = (1.0, 0.35, 0.0)
# With more classes, names or counts would be unreadable.
_MOST_NAMED, _MOST_COUNTED = 60, 20

# Label; frames T H W (3) of 0..1; mask T H W of the pixels to outline.
FrameRow = tuple[str, np.ndarray, np.ndarray | None]


@dataclass(frozen=True)
class Prediction:
    """Pictures T H W 3 (0..1) of one clip: original, tokens that the encoder kept, each step.

    `after_step[i]` shows what was given and all that was predicted up to that step; `newest[i]` is
    True (T H W) on the pixels predicted last. VideoMAE has one step.
    """

    original: np.ndarray
    kept: np.ndarray
    after_step: list[np.ndarray]
    newest: list[np.ndarray]


@torch.inference_mode()
def predict_clip(model: Objective, clip: Tensor, key: int, recipe: PretrainRecipe) -> Prediction:
    """Predict tokens of a clip T H W 3 (uint8) as `key` draws them, step by step.

    ARVideo must predict whole clusters (target_ratio 1). Normalised targets are shown with the true
    mean and contrast of their cube, which the model does not predict.
    """
    cubes = to_cubes(clip[None], model.patch)
    draw = model.draw(torch.tensor([key]))
    values = model.predict(cubes, draw).float()
    if recipe.objective.normalize_targets:
        mean, std = target_statistics(pick(cubes, draw.targets))
        split = rearrange(values, "b q (p c) -> b q p c", c=CHANNELS)
        values = rearrange(split * std + mean, "b q p c -> b q (p c)")
    pixels, grid = unit_pixels(cubes)[0], recipe.geometry.grid

    def picture(cube_values: Tensor) -> np.ndarray:
        return np.asarray(from_cubes(cube_values[None], model.patch, grid)[0].clamp(0, 1))

    kept, canvas = torch.full_like(pixels, BLANK), torch.full_like(pixels, BLANK)
    kept[draw.encoded[0]] = pixels[draw.encoded[0]]
    visible = model.visible(draw)[0]
    canvas[visible] = pixels[visible]
    after_step, newest = [], []
    per_step = rearrange(draw.targets[0], "(n r) -> n r", n=model.num_predicted)
    for tokens, cluster in zip(per_step, values[0].chunk(model.num_predicted), strict=True):
        canvas[tokens] = cluster
        last = torch.zeros_like(pixels)
        last[tokens] = 1
        after_step.append(picture(canvas))
        newest.append(picture(last)[..., 0] > 0)
    return Prediction(picture(pixels), picture(kept), after_step, newest)


def draw_prediction(prediction: Prediction, title: str, *, steps: int = MAX_STEPS) -> Figure:
    """Rows: original, encoded tokens, then so many steps of the order; columns: frames."""
    rows: list[FrameRow] = [
        ("original", prediction.original, None),
        ("seen by\nthe encoder", prediction.kept, None),
    ]
    num_steps = len(prediction.after_step)
    for step in _evenly(num_steps, steps):
        # ARVideo's first step is given.
        name = f"after step {step + 2}\nof {num_steps + 1}" if num_steps > 1 else "predicted"
        rows.append((name, prediction.after_step[step], prediction.newest[step]))
    return draw_rows(rows, title)


def draw_rows(rows: Sequence[FrameRow], title: str) -> Figure:
    """One row per clip, all of one shape; columns: frames, at most eight."""
    num_frames, height, width = rows[0][1].shape[:3]
    frames = _evenly(num_frames, _MAX_COLUMNS)
    size = (1.1 * len(frames) * width / height + 0.9, 1.1 * len(rows) + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(rows), len(frames), squeeze=False)
    for row, (label, pictures, outlined) in zip(axes, rows, strict=True):
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
        for axis, frame in zip(row, frames, strict=True):
            axis.imshow(pictures[frame], interpolation="nearest", vmin=0, vmax=1)
            if outlined is not None and outlined[frame].any():
                axis.contour(outlined[frame], levels=[0.5], colors=[_OUTLINE], linewidths=1.5)
            axis.set_xticks([])
            axis.set_yticks([])
    for axis, frame in zip(axes[0], frames, strict=True):
        axis.set_title(f"frame {frame}", fontsize=8)
    figure.suptitle(title, fontsize=9)
    return figure


def draw_loss(
    metrics: list[dict[str, float]],
    *,
    baseline: float | None = None,
    joins: Sequence[tuple[int, str]] = (),
) -> Figure:
    """Loss and learning rate over the steps.

    baseline: the loss of predicting the mean. joins: steps at which the next run resumed, with the
    name of the run before.
    """
    figure = Figure(figsize=(7, 3), layout="constrained")
    axis = figure.subplots()
    steps = [m["step"] for m in metrics]
    axis.plot(steps, [m["loss/pretrain"] for m in metrics], color="tab:blue")
    axis.set_xlabel("step")
    axis.set_ylabel("loss", color="tab:blue")
    axis.grid(alpha=0.3)
    if baseline is not None:
        label = f"predicting the mean: {baseline:.4g}"
        axis.axhline(baseline, color="black", linestyle=":", linewidth=1, label=label)
    for step, name in joins:
        axis.axvline(step, color="tab:green", linewidth=1, label=f"after {name}")
    if baseline is not None or joins:
        axis.legend(fontsize=8, loc="upper right")
    right = axis.twinx()
    right.plot(steps, [m["lr"] for m in metrics], color="tab:gray", linewidth=0.8)
    right.set_ylabel("learning rate", color="tab:gray")
    return figure


def draw_probes(summary: dict[str, float]) -> Figure:
    """Accuracies of each probe: trained encoder, untrained one, and chance.

    A probe whose plugin is not loaded is labelled by its name.
    """
    names = probe_names(summary)
    labels = [PROBES[name].label if name in PROBES else name for name in names]
    figure = Figure(figsize=(1 + 2 * len(names), 3), layout="constrained")
    axis = figure.subplots()
    for prefix, label, color, offset in (
        ("untrained_", "untrained", "tab:gray", 0.0),
        ("", "pretrained", "tab:blue", 0.4),
    ):
        heights = [100 * summary[f"{prefix}{name}_accuracy"] for name in names]
        places = [i + offset for i in range(len(names))]
        bars = axis.bar(places, heights, 0.38, label=label, color=color)
        axis.bar_label(bars, fmt="%.1f", fontsize=8)
    chance = 100 * summary["probe_chance_accuracy"]
    axis.axhline(chance, color="black", linestyle=":", linewidth=1, label=f"chance {chance:g}")
    axis.set_xticks([i + 0.2 for i in range(len(names))], labels)
    axis.set_ylabel("accuracy, %")
    axis.set_ylim(0, 108)
    axis.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    return figure


def draw_confusion(confusion: Tensor, labels: list[str]) -> Figure:
    """Rows: labels, columns: predictions; shades are shares of the row. confusion: counts C x C."""
    counts = np.asarray(confusion)
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    side = float(np.clip(0.35 * len(labels) + 2, 4, 14))
    figure = Figure(figsize=(side, side), layout="constrained")
    axis = figure.subplots()
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axis.set_xlabel("predicted")
    axis.set_ylabel("label")
    if len(labels) <= _MOST_NAMED:
        axis.set_xticks(range(len(labels)), labels, rotation=90, fontsize=8)
        axis.set_yticks(range(len(labels)), labels, fontsize=8)
    if len(labels) <= _MOST_COUNTED:
        for row, column in np.argwhere(counts):
            shade = "white" if shares[row, column] > 0.5 else "black"
            axis.text(
                column, row, counts[row, column], ha="center", va="center", color=shade, fontsize=8
            )
    return figure


def _evenly(count: int, most: int) -> list[int]:
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))})
