"""What a grid came to: one document of rows, spreads and verdicts, as JSON and as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from arvideo_ds.ablation.cell import Cell
from arvideo_ds.ablation.grid import UNTRAINED, Ablation, Plan, Row, Variant
from arvideo_ds.ablation.ranking import Spread, compare, verdict

# Key of a cell's result: how people call it.
MEASURES = {"linear": "linear probe", "knn": "nearest neighbours"}


def summarize(
    plan: Plan, cells: Sequence[Cell], failed: Mapping[str, str], *, chance: float, facts: Any
) -> dict[str, Any]:
    """The document: every ablation with its rows, accuracies in percent over the seeds.

    A row lacks the seeds that are not finished. `failed`: name of a cell -> reason. `chance` in
    percent; `facts` stand in the document as they are.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        result = cell.result()
        if result is not None:
            found.setdefault(cell.variant, []).append(result)
    grid = plan.grid
    return {
        "title": grid.title,
        "paper_figure": grid.paper_figure,
        **facts,
        "cells": len(cells),
        "finished": sum(map(len, found.values())),
        "failed": dict(failed),
        "chance": round(chance, 2),
        "untrained": _measured(found.get(UNTRAINED, [])),
        "ablations": [_ablation(plan, ablation, found) for ablation in grid.ablations],
    }


def _ablation(
    plan: Plan, ablation: Ablation, found: Mapping[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    variants = {variant.name: variant for variant in plan.variants}
    rows = [
        _row(row, variants[plan.variant_of[ablation.name, row.name]], found)
        for row in ablation.rows
    ]
    said = {}
    for measure in MEASURES:
        pairs = compare([(row["name"], row["paper"], _spread(row, measure)) for row in rows])
        said[measure] = verdict(pairs)
    return {"name": ablation.name, "title": ablation.title, "rows": rows, "verdicts": said}


def _row(row: Row, variant: Variant, found: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    results = found.get(variant.name, [])
    dropped = variant.settings.counts.dropped_share
    return {
        "name": row.name,
        "note": row.note,
        "variant": variant.name,
        "paper": row.paper,
        "dropped": None if dropped is None else round(100 * dropped, 1),
        **_measured(results),
        "seconds_per_step": _median(results, "seconds_per_step"),
        "gflops_forward_per_clip": _median(results, "gflops_forward_per_clip"),
    }


def _measured(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    measured = {}
    for measure in MEASURES:
        values = [result[measure] for result in results]
        spread = Spread(tuple(values)) if values else None
        measured[measure] = {
            "seeds": values,
            "mean": None if spread is None else round(spread.mean, 2),
            "deviation": None
            if spread is None or spread.deviation is None
            else round(spread.deviation, 2),
        }
    return measured


def _spread(row: Mapping[str, Any], measure: str) -> Spread | None:
    values = row[measure]["seeds"]
    return Spread(tuple(values)) if values else None


def _median(results: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [result[key] for result in results if result[key] is not None]
    return round(statistics.median(values), 4) if values else None


COLUMNS = (
    "row",
    *(f"{name}, %" for name in MEASURES.values()),
    "paper",
    "dropped, %",
    "s / step",
    "GFLOP",
)


def cells_of_row(row: Mapping[str, Any]) -> list[str]:
    """A row of a table in words, in the order of COLUMNS."""
    name = row["name"] + (f" ({row['note']})" if row.get("note") else "")
    return [
        name,
        *(in_words(row[measure]) for measure in MEASURES),
        *(
            "" if row.get(key) is None else form.format(row[key])
            for key, form in (
                ("paper", "{:.1f}"),
                ("dropped", "{:.0f}"),
                ("seconds_per_step", "{:.3f}"),
                ("gflops_forward_per_clip", "{:.3g}"),
            )
        ),
    ]


def in_words(spread: Mapping[str, Any]) -> str:
    if spread["mean"] is None:
        return "-"
    deviation = spread["deviation"]
    return f"{spread['mean']:.1f}" + ("" if deviation is None else f" ± {deviation:.1f}")


def references(document: Mapping[str, Any]) -> list[list[str]]:
    """The rows that stand below every table: what no pretraining gives."""
    chance = {measure: {"mean": document["chance"], "deviation": None} for measure in MEASURES}
    return [
        cells_of_row({"name": "untrained encoder", **document["untrained"]}),
        cells_of_row({"name": "chance", **chance}),
    ]


def legend(document: Mapping[str, Any]) -> str:
    return (
        f"Accuracies of the frozen encoder in percent, mean ± deviation over {document['seeds']} "
        f"seed(s). Paper: {document['paper_figure']}. Dropped: share of the tokens of steps 1..C-1 "
        "that the encoder does not see. GFLOP: counted, forward, one clip. A pair of rows is "
        "certain where its means differ by more than two standard errors."
    )


def state(document: Mapping[str, Any]) -> str:
    """How far it is, and what failed."""
    text = f"{document['finished']} of {document['cells']} cells are finished."
    if document["failed"]:
        listed = "; ".join(f"{name}: {why}" for name, why in document["failed"].items())
        text += f" Failed: {listed}."
    return text


def markdown(document: Mapping[str, Any]) -> str:
    lines = [f"# {document['title']}", "", state(document), "", legend(document), ""]
    for ablation in document["ablations"]:
        lines += [f"## {ablation['title']}", "", _line(COLUMNS), _line(["---"] * len(COLUMNS))]
        lines += [_line(cells_of_row(row)) for row in ablation["rows"]]
        lines += [_line(row) for row in references(document)]
        lines += [""]
        lines += [f"- {MEASURES[m]}: {said}" for m, said in ablation["verdicts"].items()]
        lines += [""]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
