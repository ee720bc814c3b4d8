"""Pictures of a grid, one panel per ablation, and the HTML page with tables and pictures."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from arvideo_ds.ablation.table import legend, state, table_of
from arvideo_ds.evaluation import report

_MARKERS = "os^Dv"
# Characters per line of a panel's title.
_TITLE_WIDTH = 56
# Distance of two measures of a row, in rows.
_OFFSET = 0.32


def draw_grid(
    document: Mapping[str, Any], ablations: Sequence[Mapping[str, Any]], per_line: int
) -> Figure:
    """A panel per ablation, so many per line, with a common axis of accuracies."""
    counts = [len(ablation["rows"]) for ablation in ablations]
    lines = [counts[first : first + per_line] for first in range(0, len(counts), per_line)]
    heights = [1.0 + 0.36 * max(line) for line in lines]
    figure = Figure(figsize=(4 + 4 * per_line, 0.6 + sum(heights)), layout="constrained")
    axes = figure.subplots(
        len(heights), per_line, squeeze=False, sharex=True, height_ratios=heights
    )
    for axis in axes.flat[len(ablations) :]:
        axis.set_visible(False)
    for axis, ablation in zip(axes.flat, ablations, strict=False):
        _panel(axis, document, ablation)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=8
    )
    return figure


def _panel(axis: Axes, document: Mapping[str, Any], ablation: Mapping[str, Any]) -> None:
    """A line per row: a point per seed, mean and deviation of each measure, the paper's figure."""
    rows, measures = ablation["rows"], document["measures"]
    for number, (measure, name) in enumerate(measures.items()):
        offset = _OFFSET * (number - (len(measures) - 1) / 2)
        color, marker = f"C{number}", _MARKERS[number % len(_MARKERS)]
        heights = [place + offset for place, row in enumerate(rows) if row[measure]["seeds"]]
        measured = [row[measure] for row in rows if row[measure]["seeds"]]
        for height, one in zip(heights, measured, strict=True):
            axis.scatter(one["seeds"], [height] * len(one["seeds"]), s=9, color=color, alpha=0.4)
        axis.errorbar(
            [one["mean"] for one in measured],
            heights,
            xerr=[one["deviation"] or 0 for one in measured],
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
    axis.set_title("\n".join(wrap(ablation["title"], _TITLE_WIDTH)), fontsize=10)
    axis.set_xlabel("accuracy, %")
    axis.tick_params(labelbottom=True)
    axis.grid(axis="x", alpha=0.3)
    texts = ["" if row["paper"] is None else f"paper {row['paper']:.1f}" for row in rows]
    if any(texts):
        # As text: another measure on other data does not fit the axis.
        right = axis.twinx()
        right.set_ylim(*axis.get_ylim())
        right.set_yticks(range(len(rows)), texts)
        right.tick_params(length=0)


def write_page(path: Path, document: Mapping[str, Any]) -> None:
    """One self-contained HTML file: tables, verdicts and pictures."""
    parts = [f'<p class="note">{html.escape(state(document) + " " + legend(document))}</p>']
    for ablation in document["ablations"]:
        verdicts = [
            f"By {document['measures'][m]}: {text}" for m, text in ablation["verdicts"].items()
        ]
        picture = draw_grid(document, [ablation], per_line=1)
        section = report.Section(ablation["title"], " ".join(verdicts), [picture])
        parts.append(section.html() + _table(*table_of(document, ablation)))
    report.write_page(path, document["title"], parts)


def _table(headings: Sequence[str], *rows: Sequence[str]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in headings)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"
