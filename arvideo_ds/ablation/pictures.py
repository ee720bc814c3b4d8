"""A grid drawn: a panel for each ablation, and the one page that shows everything."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from arvideo_ds.ablation.table import (
    cells_of_row,
    columns,
    legend,
    references,
    state,
)
from arvideo_ds.evaluation import report

_MARKERS = "os^Dv"
# Between two measures of a row, in rows.
_APART = 0.32


def draw_grid(document: Mapping[str, Any]) -> Figure:
    """All ablations, two panels a line, on one axis."""
    ablations = document["ablations"]
    counts = [len(ablation["rows"]) for ablation in ablations]
    heights = [_height(max(counts[first : first + 2])) for first in range(0, len(counts), 2)]
    figure, axes = plt.subplots(
        len(heights),
        2,
        figsize=(12, 0.6 + sum(heights)),
        squeeze=False,
        sharex=True,
        layout="constrained",
        height_ratios=heights,
    )
    for axis in axes.flat[len(ablations) :]:
        axis.set_visible(False)
    for axis, ablation in zip(axes.flat, ablations, strict=False):
        _panel(axis, document, ablation)
    _legend(figure)
    return figure


def draw_ablation(document: Mapping[str, Any], ablation: Mapping[str, Any]) -> Figure:
    figure, axis = plt.subplots(
        figsize=(8, 0.4 + _height(len(ablation["rows"]))), layout="constrained"
    )
    _panel(axis, document, ablation)
    _legend(figure)
    return figure


def _height(rows: int) -> float:
    """Inches of a panel."""
    return 1.0 + 0.36 * rows


def _legend(figure: Figure) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=8
    )


def _panel(axis: Axes, document: Mapping[str, Any], ablation: Mapping[str, Any]) -> None:
    """A line per row: a point per seed, mean and deviation of each measure, the paper's figure."""
    rows, measures = ablation["rows"], document["measures"]
    for number, (measure, name) in enumerate(measures.items()):
        offset = _APART * (number - (len(measures) - 1) / 2)
        color, marker = f"C{number}", _MARKERS[number % len(_MARKERS)]
        places = [place + offset for place, row in enumerate(rows) if row[measure]["seeds"]]
        found = [row[measure] for row in rows if row[measure]["seeds"]]
        for place, spread in zip(places, found, strict=True):
            axis.scatter(
                spread["seeds"], [place] * len(spread["seeds"]), s=9, color=color, alpha=0.4
            )
        axis.errorbar(
            [spread["mean"] for spread in found],
            places,
            xerr=[spread["deviation"] or 0 for spread in found],
            fmt=marker,
            color=color,
            capsize=3,
            label=name,
        )
        untrained = document["untrained"] and document["untrained"][measure]["mean"]
        if untrained is not None:
            axis.axvline(untrained, color=color, ls="--", lw=1, label=f"{name}, untrained")
    axis.axvline(document["chance"], color="black", ls=":", lw=1, label="chance")
    axis.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_title(ablation["title"], fontsize=10)
    axis.set_xlabel("accuracy, %")
    axis.tick_params(labelbottom=True)
    axis.grid(axis="x", alpha=0.3)
    if any(row["paper"] is not None for row in rows):
        _paper_figures(axis, rows)


def _paper_figures(axis: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """On the right: another measure on other data, so its numbers have no place on the axis."""
    right = axis.twinx()
    right.set_ylim(*axis.get_ylim())
    texts = ["" if row["paper"] is None else f"paper {row['paper']:.1f}" for row in rows]
    right.set_yticks(range(len(rows)), texts)
    right.tick_params(length=0)


def write_page(path: Path, document: Mapping[str, Any]) -> None:
    """One HTML file: tables, verdicts and pictures. Needs no other file."""
    parts = [f'<p class="note">{html.escape(state(document) + " " + legend(document))}</p>']
    for ablation in document["ablations"]:
        verdicts = [
            f"By {document['measures'][m]}: {text}" for m, text in ablation["verdicts"].items()
        ]
        rows = [cells_of_row(document, row) for row in ablation["rows"]] + references(document)
        section = report.section(
            ablation["title"], " ".join(verdicts), [draw_ablation(document, ablation)]
        )
        parts.append(section + _table(columns(document), rows))
    report.write_page(path, document["title"], parts)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in headings)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"
