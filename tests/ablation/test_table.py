"""The document of a grid: spreads over seeds, references, failed cells, and its three faces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from arvideo_ds.ablation import pictures, table
from arvideo_ds.ablation.cell import RESULT, Cell, cells_of
from arvideo_ds.ablation.grid import GridPlan, read_grid, resolve

GRID = {
    "title": "Test <grid>",
    "base": "demo",
    "paper_figure": "top-1 on SSv2, %",
    "ablations": [
        {
            "name": "cluster",
            "title": "Clusters",
            "rows": [
                {"name": "small", "overrides": ["objective.cluster=[1,8,8]"], "paper": 66.0},
                {"name": "base", "paper": 66.8, "note": "the default"},
            ],
        }
    ],
}
COST = {"seconds_per_step": 0.25, "minutes": 1.5, "gflops_forward_per_clip": 0.12}


@pytest.fixture
def planned(tmp_path: Path) -> tuple[GridPlan, list[Cell]]:
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(GRID))
    plan = resolve(read_grid(str(path)))
    return plan, cells_of(plan, seeds=2, output=tmp_path, deepspeed_config=path, overrides=())


def finish(cells: list[Cell], **linear: list[float]) -> None:
    """Results of the variants that are named; kNN is 10 less."""
    for cell in cells:
        values = linear.get(cell.variant)
        if values is not None and cell.seed < len(values):
            value = values[cell.seed]
            cell.folder.mkdir(parents=True)
            (cell.folder / RESULT).write_text(
                json.dumps({**COST, "linear": value, "knn": value - 10})
            )


def document(planned: tuple[GridPlan, list[Cell]], **failed: str) -> dict[str, Any]:
    plan, cells = planned
    return table.summarize(plan, cells, failed, chance=12.5, facts={"seeds": 2})


def test_mean_and_deviation_over_the_seeds_and_the_verdict(
    planned: tuple[GridPlan, list[Cell]],
) -> None:
    finish(
        planned[1], untrained=[20.0, 22.0], cluster_small=[50.0, 52.0], cluster_base=[60.0, 63.0]
    )
    found = document(planned)
    small, base = found["ablations"][0]["rows"]
    assert small["linear"] == {"seeds": [50.0, 52.0], "mean": 51.0, "deviation": 1.41}
    assert base["knn"]["mean"] == 51.5
    assert found["untrained"]["linear"]["mean"] == 21.0
    assert (found["cells"], found["finished"], found["chance"]) == (6, 6, 12.5)
    assert found["ablations"][0]["verdicts"]["linear"].startswith("The order agrees")
    text = table.markdown(found)
    assert "| small | 51.0 ± 1.4 | 41.0 ± 1.4 | 66.0 | 80 | 0.250 | 1.5 | 0.12 |" in text
    assert "| base (the default) | 61.5 ± 2.1 |" in text
    assert "| untrained encoder | 21.0 ± 1.4 |" in text
    assert "| chance | 12.5 | 12.5 |" in text
    assert "6 of 6 cells are finished." in text


def test_an_unfinished_grid_says_what_is_missing(planned: tuple[GridPlan, list[Cell]]) -> None:
    finish(planned[1], cluster_base=[60.0])
    found = document(planned, **{"cluster_small-seed0": "out of memory"})
    assert found["ablations"][0]["rows"][1]["linear"]["deviation"] is None
    text = table.markdown(found)
    assert "1 of 6 cells are finished. Failed: cluster_small-seed0: out of memory." in text
    assert "| small | - | - | 66.0 | 80 |  |  |" in text
    assert "| base (the default) | 60.0 (n = 1) | 50.0 (n = 1) |" in text
    assert "| chance | 12.5 | 12.5 |" in text
    assert "no order to compare" in text


@pytest.mark.parametrize("finished", [{}, {"cluster_base": [60.0]}])
def test_page_and_picture_of_a_grid_whatever_is_finished(
    planned: tuple[GridPlan, list[Cell]], finished: dict[str, list[float]], tmp_path: Path
) -> None:
    finish(planned[1], **finished)
    found = document(planned)
    pictures.draw_grid(found, found["ablations"], per_line=2).savefig(tmp_path / "table.png")
    pictures.write_page(tmp_path / "table.html", found)
    page = (tmp_path / "table.html").read_text()
    assert "Test &lt;grid&gt;" in page
    assert page.count("<img") == 1
    assert "untrained encoder" in page


def test_a_grid_of_fine_tuning_has_a_column_for_each_label_set(tmp_path: Path) -> None:
    heads = (
        "finetune.heads=[verb,noun]",
        "finetune.num_classes=null",
        "data.sampling=uniform",
        "finetune.init_from=runs/mine",
    )
    plan = resolve(read_grid("finetuning", "finetune_demo"), heads)
    cells = cells_of(plan, seeds=2, output=tmp_path, deepspeed_config=tmp_path, overrides=heads)
    for cell, top1 in zip(cells, (40.0, 30.0, 44.0, 32.0), strict=True):
        cell.folder.mkdir(parents=True)
        result = {**COST, "top1": top1, "verb_top1": top1 + 20, "noun_top1": top1 + 10}
        (cell.folder / RESULT).write_text(json.dumps(result))
        assert list(cell.figures()) == ["top1", "verb_top1", "noun_top1"]
    found = table.summarize(plan, cells, {}, chance=5.0, facts={"seeds": 2})
    assert found["untrained"] is None
    text = table.markdown(found)
    assert "| row | top-1, % | verb top-1, % | noun top-1, % | paper |" in text
    assert "| scratch | 31.0 ± 1.4 | 51.0 ± 1.4 | 41.0 ± 1.4 |" in text
    assert "| chance | 5.0 |" in text and "untrained" not in text
    assert "- top-1: Against pretrained, seed by seed, mean ± standard error: scratch -11.0" in text
    pictures.write_page(tmp_path / "table.html", found)
    assert "noun top-1, %" in (tmp_path / "table.html").read_text()
