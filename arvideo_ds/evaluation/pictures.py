"""Pictures of a run: the loss curve, and a clip predicted cluster by cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib

matplotlib.use("Agg")

import numpy as np
import torch
from einops import rearrange
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

from arvideo_ds.config import PretrainRecipe
from arvideo_ds.evaluation.probes import PROBES, probe_names
from arvideo_ds.geometry import CHANNELS
from arvideo_ds.models.cubes import from_cubes, pick, target_statistics, to_cubes, unit_pixels
from arvideo_ds.models.objective import Objective

# Grey of tokens that are not there.
BLANK = 0.82
_MAX_STEPS, _MAX_COLUMNS = 8, 8
_OUTLINE = (1.0, 0.35, 0.0)

# Label; T H W (3) of 0..1; what is outlined of it, T H W, if anything.
Row = tuple[str, np.ndarray, np.ndarray | None]


@dataclass(frozen=True)
class Prediction:
    """One clip, in pictures T H W 3 of 0..1: as it is, what the encoder kept, and after each step.

    `after_step[i]` shows what was given and all that was predicted up to that step; `newest[i]` is
    True (T H W) on what came last. VideoMAE has one step.
    """

    original: np.ndarray
    kept: np.ndarray
    after_step: list[np.ndarray]
    newest: list[np.ndarray]


@torch.inference_mode()
def predict_clip(model: Objective, clip: Tensor, key: int, recipe: PretrainRecipe) -> Prediction:
    """Predict tokens of a clip T H W 3 (uint8) as `key` draws them, step by step.

    ARVideo must predict all of a cluster (target_ratio 1). Normalised targets are shown with the
    true mean and contrast of their cube, which the model does not predict.
    """
    cubes = to_cubes(clip[None], model.patch)
    draw = model.draw(torch.tensor([key]))
    values = model.predict(cubes, draw).float()
    if recipe.objective.normalize_targets:
        mean, std = target_statistics(pick(cubes, draw.targets))
        split = rearrange(values, "b q (p c) -> b q p c", c=CHANNELS)
        values = rearrange(split * std + mean, "b q p c -> b q (p c)")
    pixels = unit_pixels(cubes)[0]
    grid = recipe.geometry.grid

    def picture(cube_values: Tensor) -> np.ndarray:
        return np.asarray(from_cubes(cube_values[None], model.patch, grid)[0].clamp(0, 1))

    kept = torch.full_like(pixels, BLANK)
    kept[draw.encoded[0]] = pixels[draw.encoded[0]]
    canvas = torch.full_like(pixels, BLANK)
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


def draw_prediction(prediction: Prediction, title: str) -> Figure:
    """Rows: original, kept tokens, then steps of the order; columns: frames."""
    rows: list[Row]
    rows = [("original", prediction.original, None), ("kept tokens", prediction.kept, None)]
    rows += [
        (_step_name(step, prediction), prediction.after_step[step], prediction.newest[step])
        for step in _evenly(len(prediction.after_step), _MAX_STEPS)
    ]
    return draw_rows(rows, title)


def draw_rows(rows: Sequence[Row], title: str) -> Figure:
    """Clips of one shape below each other; columns: frames, at most eight."""
    num_frames, height, width = rows[0][1].shape[:3]
    frames = _evenly(num_frames, _MAX_COLUMNS)
    figure, axes = plt.subplots(
        len(rows),
        len(frames),
        figsize=(1.1 * len(frames) * width / height + 0.9, 1.1 * len(rows) + 0.4),
        squeeze=False,
        layout="constrained",
    )
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


def _step_name(step: int, prediction: Prediction) -> str:
    # ARVideo's first step is given.
    return f"step {step + 2}" if len(prediction.after_step) > 1 else "predicted"


def draw_loss(
    metrics: list[dict[str, float]],
    *,
    baseline: float | None = None,
    joins: Sequence[tuple[int, str]] = (),
) -> Figure:
    """Loss and learning rate over the steps.

    baseline: the loss of predicting the mean. joins: steps at which another run continues, with
    the name of the run before.
    """
    figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
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
    """Accuracies of the probes that were made: trained encoder, untrained one, and chance.

    One whose plugin is not loaded has its name for a label.
    """
    names = probe_names(summary)
    labels = [PROBES[name].label if name in PROBES else name for name in names]
    figure, axis = plt.subplots(figsize=(1 + 2 * len(names), 3), layout="constrained")
    for offset, (prefix, label, color) in enumerate(
        (("untrained_", "untrained", "tab:gray"), ("", "pretrained", "tab:blue"))
    ):
        heights = [100 * summary[f"{prefix}{name}_accuracy"] for name in names]
        bars = axis.bar(
            [i + 0.4 * offset for i in range(len(names))], heights, 0.38, label=label, color=color
        )
        axis.bar_label(bars, fmt="%.1f", fontsize=8)
    chance = 100 * summary["probe_chance_accuracy"]
    axis.axhline(chance, color="black", linestyle=":", linewidth=1, label=f"chance {chance:g}")
    axis.set_xticks([i + 0.2 for i in range(len(names))], labels)
    axis.set_ylabel("accuracy, %")
    axis.set_ylim(0, 108)
    axis.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    return figure


def _evenly(count: int, most: int) -> list[int]:
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))})
