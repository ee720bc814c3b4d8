"""What a grid came to: one document of rows, spreads and verdicts, as JSON and as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from arvideo_ds.ablation.cell import Cell
from arvideo_ds.ablation.grid import UNTRAINED, Ablation, Plan, Row, Variant
from arvideo_ds.ablation.judges import judge_of
from arvideo_ds.ablation.ranking import Spread, compare, differences, verdict

# Of one variant, by seed.
Results = Mapping[int, Mapping[str, Any]]


def summarize(
    plan: Plan, cells: Sequence[Cell], failed: Mapping[str, str], *, chance: float, facts: Any
) -> dict[str, Any]:
    """The document: every ablation with its rows, accuracies in percent over the seeds.

    A row lacks the seeds that are not finished. `failed`: name of a cell -> reason. `chance` in
    percent; `facts` are in the document as they are.
    """
    found: dict[str, dict[int, dict[str, Any]]] = {variant.name: {} for variant in plan.variants}
    for cell in cells:
        result = cell.result()
        if result is not None:
            found.setdefault(cell.variant, {})[cell.seed] = result
    grid, judge = plan.grid, judge_of(plan.base)
    measures = judge.measures(plan.base)
    return {
        "title": grid.title,
        "paper_figure": grid.paper_figure,
        **facts,
        "cells": len(cells),
        "finished": sum(map(len, found.values())),
        "failed": dict(failed),
        "legend": judge.legend,
        "measures": measures,
        "chance": round(chance, 2),
        "untrained": _measured(measures, found.get(UNTRAINED, {})) if judge.untrained else None,
        "ablations": [_ablation(plan, ablation, measures, found) for ablation in grid.ablations],
    }


def _ablation(
    plan: Plan, ablation: Ablation, measures: Iterable[str], found: Mapping[str, Results]
) -> dict[str, Any]:
    variants = {variant.name: variant for variant in plan.variants}
    named = [(row, variants[plan.variant_of[ablation.name, row.name]]) for row in ablation.rows]
    results = [found[variant.name] for _, variant in named]
    verdicts = {}
    for measure in measures:
        values = [{seed: one[measure] for seed, one in of_row.items()} for of_row in results]
        verdicts[measure] = _verdict(ablation.rows, values)
    rows = [
        _row(row, variant, measures, of_row)
        for (row, variant), of_row in zip(named, results, strict=True)
    ]
    return {"name": ablation.name, "title": ablation.title, "rows": rows, "verdicts": verdicts}


def _verdict(rows: Sequence[Row], values: Sequence[Mapping[int, float]]) -> str:
    """Against the paper's order, or against the first row where the paper has none."""
    pairs = zip(rows, values, strict=True)
    if all(row.paper is None for row in rows) and len(rows) > 1:
        return differences([(row.name, of_row) for row, of_row in pairs])
    return verdict(compare([(row.name, row.paper, _spread(of_row)) for row, of_row in pairs]))


def _row(row: Row, variant: Variant, measures: Iterable[str], results: Results) -> dict[str, Any]:
    dropped = variant.settings.counts.dropped_share
    return {
        "name": row.name,
        "note": row.note,
        "variant": variant.name,
        "paper": row.paper,
        "dropped": None if dropped is None else round(100 * dropped, 1),
        **_measured(measures, results),
        "seconds_per_step": _median(results, "seconds_per_step"),
        "gflops_forward_per_clip": _median(results, "gflops_forward_per_clip"),
    }


def _measured(measures: Iterable[str], results: Results) -> dict[str, Any]:
    measured = {}
    for measure in measures:
        values = {seed: result[measure] for seed, result in results.items()}
        spread = _spread(values)
        measured[measure] = {
            "seeds": list(values.values()),
            "mean": None if spread is None else round(spread.mean, 2),
            "deviation": None
            if spread is None or spread.deviation is None
            else round(spread.deviation, 2),
        }
    return measured


def _spread(values: Mapping[int, float]) -> Spread | None:
    return Spread(tuple(values.values())) if values else None


def _median(results: Results, key: str) -> float | None:
    values = [result[key] for result in results.values() if result[key] is not None]
    return round(statistics.median(values), 4) if values else None


# Of the key of a row: its heading and its form.
_FACTS = {
    "paper": ("paper", "{:.1f}"),
    "dropped": ("dropped, %", "{:.0f}"),
    "seconds_per_step": ("s / step", "{:.3f}"),
    "gflops_forward_per_clip": ("GFLOP", "{:.3g}"),
}


def columns(document: Mapping[str, Any]) -> list[str]:
    measures = [f"{name}, %" for name in document["measures"].values()]
    return ["row", *measures, *(heading for heading, _ in _FACTS.values())]


def cells_of_row(document: Mapping[str, Any], row: Mapping[str, Any]) -> list[str]:
    """A row of a table in words, in the order of `columns`."""
    name = row["name"] + (f" ({row['note']})" if row.get("note") else "")
    return [
        name,
        *(in_words(row[measure]) for measure in document["measures"]),
        *(
            "" if row.get(key) is None else form.format(row[key])
            for key, (_, form) in _FACTS.items()
        ),
    ]


def in_words(spread: Mapping[str, Any]) -> str:
    if spread["mean"] is None:
        return "-"
    deviation = spread["deviation"]
    return f"{spread['mean']:.1f}" + ("" if deviation is None else f" ± {deviation:.1f}")


def references(document: Mapping[str, Any]) -> list[list[str]]:
    """The rows below every table: what no training gives."""
    chance = {"mean": document["chance"], "deviation": None}
    rows = [{"name": "chance", **dict.fromkeys(document["measures"], chance)}]
    if document["untrained"] is not None:
        rows.insert(0, {"name": "untrained encoder", **document["untrained"]})
    return [cells_of_row(document, row) for row in rows]


def legend(document: Mapping[str, Any]) -> str:
    return (
        f"{document['legend']} in percent, mean ± deviation over {document['seeds']} "
        f"seed(s). Paper: {document['paper_figure']}. Dropped: share of the tokens of steps 1..C-1 "
        "that the encoder does not see. GFLOP: counted, forward, one clip. A difference is "
        "certain where it is more than two standard errors."
    )


def state(document: Mapping[str, Any]) -> str:
    """How far it is, and what failed."""
    text = f"{document['finished']} of {document['cells']} cells are finished."
    if document["failed"]:
        listed = "; ".join(f"{name}: {why}" for name, why in document["failed"].items())
        text += f" Failed: {listed}."
    return text


def markdown(document: Mapping[str, Any]) -> str:
    lines, headings = [f"# {document['title']}", "", state(document), ""], columns(document)
    lines += [legend(document), ""]
    for ablation in document["ablations"]:
        lines += [f"## {ablation['title']}", "", _line(headings), _line(["---"] * len(headings))]
        lines += [_line(cells_of_row(document, row)) for row in ablation["rows"]]
        lines += [_line(row) for row in references(document)]
        lines += [""]
        lines += [
            f"- {document['measures'][m]}: {text}" for m, text in ablation["verdicts"].items()
        ]
        lines += [""]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
