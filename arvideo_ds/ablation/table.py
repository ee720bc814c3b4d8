"""The results of a grid: one document of rows, means and verdicts, as JSON and as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from arvideo_ds.ablation.cell import Cell
from arvideo_ds.ablation.grid import UNTRAINED, Ablation, GridPlan, GridRow
from arvideo_ds.ablation.judges import judge_of
from arvideo_ds.ablation.ranking import compare, differences, verdict

# Of one variant, by fold and seed.
Results = Mapping[tuple[int, int], Mapping[str, Any]]
Values = Mapping[tuple[int, int], float]


def summarize(
    plan: GridPlan, cells: Sequence[Cell], failed: Mapping[str, str], *, chance: float, facts: Any
) -> dict[str, Any]:
    """The document: every ablation with its rows, accuracies in percent over folds and seeds.

    Unfinished cells are missing. failed: name of a cell -> reason. chance: in percent. facts: added
    as they are.
    """
    results: dict[str, dict[tuple[int, int], dict[str, Any]]] = {}
    for cell in cells:
        if (result := cell.result()) is not None:
            results.setdefault(cell.variant, {})[cell.fold, cell.seed] = result
    grid, judge = plan.grid, judge_of(plan.base)
    measures = judge.measures(plan.base)
    untrained = results.get(UNTRAINED, {})
    return {
        "title": grid.title,
        "paper_figure": grid.paper_figure,
        **facts,
        "cells": len(cells),
        "finished": sum(map(len, results.values())),
        "failed": dict(failed),
        "legend": judge.legend,
        "measures": measures,
        "chance": round(chance, 2),
        "untrained": _measured(measures, untrained) if judge.untrained else None,
        "ablations": [_ablation(plan, ablation, measures, results) for ablation in grid.ablations],
    }


def _ablation(
    plan: GridPlan, ablation: Ablation, measures: Iterable[str], results: Mapping[str, Results]
) -> dict[str, Any]:
    variants = {variant.name: variant for variant in plan.variants}
    rows, values = [], [(measure, list[Values]()) for measure in measures]
    for row in ablation.rows:
        variant = variants[plan.variant_of[ablation.name, row.name]]
        of_row, dropped = results.get(variant.name, {}), variant.settings.counts.dropped_share
        for measure, of_rows in values:
            of_rows.append(_values(of_row, measure))
        rows.append(
            {
                "name": row.name,
                "note": row.note,
                "variant": variant.name,
                "paper": row.paper,
                "dropped": None if dropped is None else round(100 * dropped, 1),
                **_measured(measures, of_row),
                "seconds_per_step": _median(of_row, "seconds_per_step"),
                "minutes": _median(of_row, "minutes"),
                "gflops_forward_per_clip": _median(of_row, "gflops_forward_per_clip"),
            }
        )
    verdicts = {measure: _verdict(ablation.rows, of_rows) for measure, of_rows in values}
    return {"name": ablation.name, "title": ablation.title, "rows": rows, "verdicts": verdicts}


def _verdict(rows: Sequence[GridRow], values: Sequence[Values]) -> str:
    """Against the paper's order, or against the first row if the paper has no figures."""
    pairs = list(zip(rows, values, strict=True))
    if all(row.paper is None for row in rows) and len(rows) > 1:
        return differences([(row.name, of_row) for row, of_row in pairs])
    return verdict(compare([(row.name, row.paper, [*of_row.values()]) for row, of_row in pairs]))


def _measured(measures: Iterable[str], results: Results) -> dict[str, Any]:
    measured = {}
    for measure in measures:
        values = [*_values(results, measure).values()]
        measured[measure] = {
            "seeds": values,
            "mean": round(statistics.mean(values), 2) if values else None,
            "deviation": round(statistics.stdev(values), 2) if len(values) > 1 else None,
        }
    return measured


def _values(results: Results, key: str) -> Values:
    # Results of earlier versions have no minutes.
    found = {number: result.get(key) for number, result in results.items()}
    return {number: value for number, value in found.items() if value is not None}


def _median(results: Results, key: str) -> float | None:
    values = _values(results, key).values()
    return round(statistics.median(values), 4) if values else None


# Key of a row -> its heading and format.
_FACTS = {
    "paper": ("paper", "{:.1f}"),
    "dropped": ("dropped, %", "{:.0f}"),
    "seconds_per_step": ("s / step", "{:.3f}"),
    "minutes": ("minutes", "{:.1f}"),
    "gflops_forward_per_clip": ("GFLOP", "{:.3g}"),
}


def table_of(document: Mapping[str, Any], ablation: Mapping[str, Any]) -> list[list[str]]:
    """The lines of an ablation's table: headings, rows, references."""
    measures = [f"{name}, %" for name in document["measures"].values()]
    headings = ["row", *measures, *(heading for heading, _ in _FACTS.values())]
    runs = document["seeds"] * document.get("folds", 1)
    rows = list(ablation["rows"])
    if document["untrained"] is not None:
        rows.append({"name": "untrained encoder", **document["untrained"]})
    lines = [headings]
    for row in rows:
        note = f" ({row['note']})" if row.get("note") else ""
        lines.append([row["name"] + note])
        lines[-1] += [_mean_and_deviation(row[measure], runs) for measure in document["measures"]]
        for key, (_, form) in _FACTS.items():
            lines[-1].append("" if row.get(key) is None else form.format(row[key]))
    chance = [f"{document['chance']:.1f}"] * len(measures)
    return [*lines, ["chance", *chance, *[""] * len(_FACTS)]]


def _mean_and_deviation(measured: Mapping[str, Any], runs: int) -> str:
    mean, deviation, count = measured["mean"], measured["deviation"], len(measured["seeds"])
    if mean is None:
        return "-"
    text = f"{mean:.1f}" + ("" if deviation is None else f" ± {deviation:.1f}")
    return text if count == runs else f"{text} (n = {count})"


def legend(document: Mapping[str, Any]) -> str:
    folds = document.get("folds", 1)
    of_folds = f" of each of {folds} folds" if folds > 1 else ""
    return (
        f"{document['legend']} in percent, mean ± deviation over {document['seeds']} "
        f"seed(s){of_folds}; n: the finished ones, where fewer. Paper: "
        f"{document['paper_figure']}. Dropped: share of the tokens of "
        "steps 1..C-1 that the encoder does not see. Minutes: of all training steps. GFLOP: "
        "counted, forward, one clip. Significant: p < 5 % by Student's t test over the seeds."
    )


def state(document: Mapping[str, Any]) -> str:
    """The number of finished cells, and the failed cells."""
    text = f"{document['finished']} of {document['cells']} cells are finished."
    if document["failed"]:
        listed = "; ".join(f"{name}: {why}" for name, why in document["failed"].items())
        text += f" Failed: {listed}."
    return text


def markdown(document: Mapping[str, Any]) -> str:
    lines = [f"# {document['title']}", "", state(document), "", legend(document), ""]
    for ablation in document["ablations"]:
        headings, *rows = table_of(document, ablation)
        rows = [headings, ["---"] * len(headings), *rows]
        lines += [f"## {ablation['title']}", "", *map(_line, rows), ""]
        lines += [
            f"- {document['measures'][m]}: {text}" for m, text in ablation["verdicts"].items()
        ]
        lines += [""]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
