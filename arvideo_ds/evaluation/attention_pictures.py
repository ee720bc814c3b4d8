"""The rank of the attention maps over the layers, a line for each encoder."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from arvideo_ds.evaluation.attention import Statistics


def draw_ranks(panels: Mapping[str, Mapping[str, Statistics]], num_tokens: int) -> Figure:
    """A panel for each measure, in it a line for each encoder: mean and band of one deviation.

    panels: title -> encoder -> its statistics. num_tokens: what no rank exceeds.
    """
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.6 * len(panels), 3.8), layout="constrained", squeeze=False
    )
    for axis, (title, encoders) in zip(axes[0], panels.items(), strict=True):
        for name, found in encoders.items():
            mean, deviation = np.array(found.mean), np.array(found.deviation)
            layers = 1 + np.arange(len(mean))
            (line,) = axis.plot(layers, mean, marker="o", markersize=4, label=name)
            axis.fill_between(
                layers, mean - deviation, mean + deviation, color=line.get_color(), alpha=0.15
            )
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("layer")
        axis.set_ylim(bottom=0)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel(f"of {num_tokens} tokens")
    axes[0, 0].legend(frameon=False, fontsize=9)
    figure.supxlabel("mean and one standard deviation over heads and clips", fontsize=9)
    return figure
