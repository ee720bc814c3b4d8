"""The confusion matrix as a picture."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

# Above so many classes names and counts would be unreadable.
_MOST_NAMED, _MOST_COUNTED = 60, 20


def draw_confusion(confusion: Tensor, labels: list[str]) -> Figure:
    """Rows: labels, columns: predictions; shades are shares of the row. confusion: counts C x C."""
    counts = np.asarray(confusion)
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    side = float(np.clip(0.35 * len(labels) + 2, 4, 14))
    figure, axis = plt.subplots(figsize=(side, side), layout="constrained")
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
