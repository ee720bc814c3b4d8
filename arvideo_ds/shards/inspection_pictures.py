"""Histograms of the facts of shards, and a contact sheet of their videos."""

from __future__ import annotations

import math
import textwrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from arvideo_ds.shards.inspection import Inspection, Thumbnail, rounded

_BLUE, _ORANGE, _GRAY = "#3b6ea8", "#d9730d", "#6b6b6b"
# Up to this number of different values, a histogram has one bar for each.
_FEW_VALUES, _MOST_BINS = 10, 40
# Up to this number of classes, the plot shows their names.
_NAMED_CLASSES = 40
_COLUMNS, _BOX_INCHES = 6, 1.9
# Characters that fit below a frame, and in the name of a class or a key.
_LABEL_LINE, _LONGEST_NAME = 30, 36


def draw_histograms(inspection: Inspection) -> Figure:
    """Length in frames and seconds, short side, frame rate, and samples per class."""
    num_labels = len(inspection.label_counts)
    lower = max(3.0, 0.9 + 0.21 * (num_labels if num_labels <= _NAMED_CLASSES else 0))
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = Figure(figsize=(11, 3.4 + lower), layout=layout)
    grid = figure.add_gridspec(2, 3, height_ratios=(3.0, lower))
    for place, values, name in (
        (grid[0, 0], inspection.num_frames, "frames"),
        (grid[0, 1], inspection.duration_s, "seconds"),
        (grid[0, 2], inspection.short_side, "short side, pixels"),
        (grid[1, 0], inspection.fps, "frames per second"),
    ):
        _draw_values(figure.add_subplot(place), values, name)
    _draw_classes(figure.add_subplot(grid[1, 1:]), inspection.most_frequent_labels)
    title = f"{inspection.name}: {inspection.num_samples:,} videos"
    title += f", {inspection.duration_s.sum() / 3600:,.2f} h"
    figure.suptitle(title, fontsize=12, parse_math=False)
    return figure


def _draw_values(axis: Axes, values: np.ndarray, name: str) -> None:
    """Number of videos over a value: a bar per value if there are few, else a histogram."""
    _plain(axis)
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) <= _FEW_VALUES:
        bars = axis.bar(range(len(distinct)), counts, 0.7, color=_BLUE)
        size = 8.0 if len(distinct) <= 5 else 6.5
        axis.bar_label(bars, [f"{count:,}" for count in counts], padding=2, fontsize=size)
        axis.set_xticks(range(len(distinct)), [f"{value:g}" for value in distinct], size=size)
        # A single bar should not fill the panel.
        middle, half = (len(distinct) - 1) / 2, max(2.0, len(distinct) / 2)
        axis.set_xlim(middle - half, middle + half)
        axis.margins(y=0.12)
    else:
        axis.hist(values, bins=_bins(values), color=_BLUE, edgecolor="white", linewidth=0.4)
        median = float(np.median(values))
        axis.axvline(median, color=_ORANGE, linewidth=1.5)
        axis.set_title(f"median {rounded(median)}", fontsize=9, color=_ORANGE)
    axis.set_xlabel(name)
    axis.set_ylabel("videos")
    _count(axis.yaxis)


def _bins(values: np.ndarray) -> list[float]:
    """Edges of equally wide bins; for integers each bin has equally many of them."""
    low, high = float(values.min()), float(values.max())
    count = min(_MOST_BINS, max(10, round(2 * math.sqrt(len(values)))))
    if np.issubdtype(values.dtype, np.integer):
        width = max(1, math.ceil((high - low + 1) / count))
        return list(np.arange(low - 0.5, high + width + 0.5, width))
    return list(np.linspace(low, high, count + 1))


def _draw_classes(axis: Axes, counts: list[tuple[str, int]]) -> None:
    """Samples per class, largest first; with names if there are few."""
    _plain(axis)
    if not counts:
        axis.set_axis_off()
        axis.text(0.5, 0.5, "no labels", ha="center", transform=axis.transAxes, color=_GRAY)
        return
    places, heights = range(len(counts)), [count for _, count in counts]
    if len(counts) <= _NAMED_CLASSES:
        bars = axis.barh(places, heights, 0.75, color=_BLUE)
        axis.bar_label(bars, [f"{count:,}" for count in heights], padding=3, fontsize=8)
        axis.set_yticks(places, [_shortened(name) for name, _ in counts], parse_math=False)
        axis.tick_params(axis="y", length=0, labelsize=8)
        axis.set_ylim(len(counts) - 0.4, -0.6)
        axis.grid(visible=False)
        axis.margins(x=0.08)
        _count(axis.xaxis)
        axis.set_xlabel(f"videos per class ({len(counts)} classes)")
        return
    axis.fill_between(places, heights, step="mid", color=_BLUE)
    axis.set_xlim(-0.5, len(counts) - 0.5)
    axis.set_ylim(bottom=0)
    _count(axis.yaxis)
    axis.set_xlabel(f"{len(counts):,} classes, the most frequent first")
    axis.set_ylabel("videos per class")
    ends = f"most: {_shortened(counts[0][0])} ({heights[0]:,})"
    ends += f"\nfewest: {_shortened(counts[-1][0])} ({heights[-1]:,})"
    box = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none"}
    text = axis.text(0.98, 0.96, ends, transform=axis.transAxes, fontsize=8, bbox=box)
    text.set(ha="right", va="top", parse_math=False)


def _count(axis: Axis) -> None:
    axis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _plain(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#e3e3e3", linewidth=0.8)
    axis.set_axisbelow(True)


def draw_contact_sheet(thumbnails: list[Thumbnail], inspection: Inspection) -> Figure:
    """One frame per video in equal boxes, with label and key below."""
    columns = min(_COLUMNS, len(thumbnails))
    rows = math.ceil(len(thumbnails) / columns)
    frames = [t.frame for t in thumbnails if t.frame is not None]
    # Width by height of the boxes: the median of the frames, within reason.
    aspects = [frame.shape[1] / frame.shape[0] for frame in frames]
    aspect = float(np.clip(np.median(aspects or [1.0]), 0.75, 1.8))
    box_height = _BOX_INCHES / aspect
    # In inches: small gaps between boxes, text below each, the title above all.
    column_width, row_height = _BOX_INCHES + 0.12, box_height + 0.62
    width, height = columns * column_width + 0.28, rows * row_height + 0.5
    figure = Figure(figsize=(width, height))
    for place, thumbnail in enumerate(thumbnails):
        row, column = divmod(place, columns)
        left, bottom = 0.2 + column * column_width, height - 0.5 - row * row_height - box_height
        box = (left / width, bottom / height, _BOX_INCHES / width, box_height / height)
        _draw_thumbnail(figure.add_axes(box), thumbnail, aspect)
    title = f"middle frames of {len(thumbnails):,} of {inspection.num_samples:,} videos"
    text = figure.text(0.5, 1 - 0.25 / height, f"{inspection.name}: {title}", fontsize=11)
    text.set(ha="center", va="center", parse_math=False)
    return figure


def _draw_thumbnail(axis: Axes, thumbnail: Thumbnail, aspect: float) -> None:
    axis.set_facecolor("#efefef")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    if thumbnail.frame is None:
        message = textwrap.fill(f"does not decode: {thumbnail.problem}", 26)
        text = axis.text(0.5, 0.5, message, transform=axis.transAxes, fontsize=6)
        text.set(ha="center", va="center", parse_math=False)
    else:
        height, width = thumbnail.frame.shape[:2]
        # The frame fits into the box, centred, undistorted.
        half = max(width / 2, height / 2 * aspect)
        axis.imshow(thumbnail.frame, extent=(-width / 2, width / 2, -height / 2, height / 2))
        axis.set_xlim(-half, half)
        axis.set_ylim(-half / aspect, half / aspect)
    label = textwrap.wrap(thumbnail.label or "no label", _LABEL_LINE, max_lines=2, placeholder="…")
    down = -4.0  # in points below the box
    lines = [(line, 8, "black") for line in label] + [(_shortened(thumbnail.key), 6, _GRAY)]
    for line, size, color in lines:
        text = axis.annotate(
            line, (0.5, 0), (0, down), xycoords="axes fraction", textcoords="offset points"
        )
        text.set(ha="center", va="top", fontsize=size, color=color, parse_math=False)
        down -= 1.4 * size


def _shortened(text: str) -> str:
    """Start and end of a long text: names often differ at their ends."""
    if len(text) <= _LONGEST_NAME:
        return text
    half = (_LONGEST_NAME - 1) // 2
    return f"{text[:half]}…{text[-half:]}"
