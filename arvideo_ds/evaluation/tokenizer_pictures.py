"""What a tokenizer made of a clip: original, reconstruction, importance and the tokens that stayed.

T H W frames and pixels, t h w token grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib

matplotlib.use("Agg")

import numpy as np
import torch
from einops import repeat
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

from arvideo_ds.models.cubes import unit_pixels
from arvideo_ds.models.tokenizer import Tokenizer

_BLANK = 0.82
_MAX_COLUMNS = 8


@dataclass(frozen=True)
class Example:
    """Pictures T H W 3 of 0..1, and T H W of importance, 1 where it is largest."""

    original: np.ndarray
    reconstruction: np.ndarray
    kept: np.ndarray
    importance: np.ndarray


@torch.inference_mode()
def example(tokenizer: Tokenizer, clip: Tensor) -> Example:
    """A clip T H W 3 (uint8) through the tokenizer."""
    made = tokenizer(clip[None])
    scores, _ = tokenizer.tokens(clip[None])
    original = unit_pixels(clip)

    def spread(tokens: Tensor) -> Tensor:
        pt, ph, pw = tokenizer.patch
        return repeat(tokens, "t h w -> (t pt) (h ph) (w pw)", pt=pt, ph=ph, pw=pw)

    kept = spread(made.kept[0])[..., None]
    return Example(
        np.asarray(original),
        np.asarray(made.pixels[0].clamp(0, 1)),
        np.asarray(original * kept + _BLANK * (1 - kept)),
        np.asarray(spread(scores[0] / scores.max())),
    )


def draw_examples(examples: Sequence[Example], title: str) -> Figure:
    """Four rows for each clip; columns are frames."""
    rows = ("original", "reconstruction", "tokens kept", "importance")
    frames = _evenly(len(examples[0].original))
    height, width = examples[0].original.shape[1:3]
    figure, axes = plt.subplots(
        len(rows) * len(examples),
        len(frames),
        figsize=(1.1 * len(frames) * width / height + 1, 1.1 * len(rows) * len(examples) + 0.4),
        squeeze=False,
        layout="constrained",
    )
    shown = [
        (label, pictures)
        for one in examples
        for label, pictures in zip(
            rows, (one.original, one.reconstruction, one.kept, one.importance), strict=True
        )
    ]
    for row, (label, pictures) in zip(axes, shown, strict=True):
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
        for axis, frame in zip(row, frames, strict=True):
            axis.imshow(pictures[frame], interpolation="nearest", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
    for axis, frame in zip(axes[0], frames, strict=True):
        axis.set_title(f"frame {frame}", fontsize=8)
    figure.suptitle(title, fontsize=9)
    return figure


def _evenly(count: int) -> list[int]:
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, _MAX_COLUMNS))})
