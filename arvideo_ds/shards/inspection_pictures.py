"""Pictures of a set of shards: histograms of its facts, and a contact sheet of its videos."""

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
# A histogram of so few values is a bar for each.
_FEW_VALUES, _MOST_BINS = 10, 40
# Up to so many classes have their names written.
_NAMED_CLASSES = 40
_COLUMNS, _BOX_INCHES = 6, 1.9
# Characters that fit: of a label below a frame, and of a class or a key.
_LABEL_LINE, _LONGEST_NAME = 30, 36


def draw_histograms(found: Inspection) -> Figure:
    """Length in frames and seconds, short side, frame rate, and samples per class."""
    named = len(found.label_counts) if len(found.label_counts) <= _NAMED_CLASSES else 0
    lower = max(3.0, 0.9 + 0.21 * named)
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = Figure(figsize=(11, 3.4 + lower), layout=layout)
    grid = figure.add_gridspec(2, 3, height_ratios=(3.0, lower))
    top = [figure.add_subplot(grid[0, column]) for column in range(3)]
    _draw_values(top[0], found.num_frames, "frames")
    _draw_values(top[1], found.duration_s, "seconds")
    _draw_values(top[2], found.short_side, "short side, pixels")
    _draw_values(figure.add_subplot(grid[1, 0]), found.fps, "frames per second")
    _draw_classes(figure.add_subplot(grid[1, 1:]), found.label_counts)
    title = f"{_name(found)}: {found.num_samples:,} videos"
    title += f", {found.duration_s.sum() / 3600:,.2f} h"
    figure.suptitle(title, fontsize=12, parse_math=False)
    return figure


def _name(found: Inspection) -> str:
    return found.dataset + (f", split {found.split}" if found.split else "")


def _draw_values(axis: Axes, values: np.ndarray, name: str) -> None:
    """Number of videos over a value: a bar per value where these are few, else a histogram."""
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
    """Edges of equally wide bins; for whole numbers each bin holds equally many of these."""
    low, high = float(values.min()), float(values.max())
    count = min(_MOST_BINS, max(10, round(2 * math.sqrt(len(values)))))
    if np.issubdtype(values.dtype, np.integer):
        width = max(1, math.ceil((high - low + 1) / count))
        return [float(edge) for edge in np.arange(low - 0.5, high + width + 0.5, width)]
    return [float(edge) for edge in np.linspace(low, high, count + 1)]


def _draw_classes(axis: Axes, label_counts: dict[str, int]) -> None:
    """Samples per class, most first; names where they can be read."""
    _plain(axis)
    counts = sorted(label_counts.items(), key=lambda item: (-item[1], item[0]))
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
    axis.text(
        *(0.98, 0.96, ends),
        transform=axis.transAxes,
        ha="right",
        va="top",
        fontsize=8,
        parse_math=False,
        bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none"},
    )


def _count(axis: Axis) -> None:
    axis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _plain(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#e3e3e3", linewidth=0.8)
    axis.set_axisbelow(True)


def draw_contact_sheet(thumbnails: list[Thumbnail], found: Inspection) -> Figure:
    """One frame per video in equal boxes, with label and key below."""
    columns = min(_COLUMNS, len(thumbnails))
    rows = math.ceil(len(thumbnails) / columns)
    aspect = _box_aspect(thumbnails)
    box_height = _BOX_INCHES / aspect
    # In inches: boxes a little apart, text below each, the title above all.
    column_width, row_height = _BOX_INCHES + 0.12, box_height + 0.62
    width, height = columns * column_width + 0.28, rows * row_height + 0.5
    figure = Figure(figsize=(width, height))
    for place, thumbnail in enumerate(thumbnails):
        row, column = divmod(place, columns)
        left, bottom = 0.2 + column * column_width, height - 0.5 - row * row_height - box_height
        box = (left / width, bottom / height, _BOX_INCHES / width, box_height / height)
        _draw_thumbnail(figure.add_axes(box), thumbnail, aspect)
    figure.text(
        *(0.5, 1 - 0.25 / height),
        f"{_name(found)}: middle frames of {len(thumbnails):,} of {found.num_samples:,} videos",
        ha="center",
        va="center",
        fontsize=11,
        parse_math=False,
    )
    return figure


def _box_aspect(thumbnails: list[Thumbnail]) -> float:
    """Width by height of the boxes: that of the middlemost frame, within reason."""
    frames = [t.frame for t in thumbnails if t.frame is not None]
    aspects = [frame.shape[1] / frame.shape[0] for frame in frames]
    return float(np.clip(np.median(aspects or [1.0]), 0.75, 1.8))


def _draw_thumbnail(axis: Axes, thumbnail: Thumbnail, aspect: float) -> None:
    axis.set_facecolor("#efefef")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    if thumbnail.frame is None:
        message = textwrap.fill(f"does not decode: {thumbnail.problem}", 26)
        axis.text(
            *(0.5, 0.5, message),
            transform=axis.transAxes,
            ha="center",
            va="center",
            fontsize=6,
            parse_math=False,
        )
    else:
        height, width = thumbnail.frame.shape[:2]
        # The frame fills the box, centred, without being stretched.
        half = max(width / 2, height / 2 * aspect)
        axis.imshow(thumbnail.frame, extent=(-width / 2, width / 2, -height / 2, height / 2))
        axis.set_xlim(-half, half)
        axis.set_ylim(-half / aspect, half / aspect)
    label = textwrap.wrap(thumbnail.label or "no label", _LABEL_LINE, max_lines=2, placeholder="…")
    # One text under the other, in points below the box.
    down = -4.0
    lines = [(line, 8, "black") for line in label] + [(_shortened(thumbnail.key), 6, _GRAY)]
    for text, size, color in lines:
        axis.annotate(
            text,
            (0.5, 0),
            (0, down),
            xycoords="axes fraction",
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=size,
            color=color,
            parse_math=False,
        )
        down -= 1.4 * size


def _shortened(text: str) -> str:
    """Start and end of a long text: names often differ at their ends."""
    if len(text) <= _LONGEST_NAME:
        return text
    half = (_LONGEST_NAME - 1) // 2
    return f"{text[:half]}…{text[-half:]}"
