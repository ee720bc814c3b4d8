"""A finished cell is asked again only with what it was finished with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from arvideo_ds.ablation.cell import RESULT, Cell, require_same
from arvideo_ds.ablation.grid import UNTRAINED
from arvideo_ds.data.token_scores import SCORES, ScoreContents, ScoreSpec
from arvideo_ds.errors import UserError

DATA = {"manifest": "a" * 64}


def cell(tmp_path: Path, variant: str = "rule_flow") -> Cell:
    (tmp_path / "cell").mkdir(exist_ok=True)
    scores = f"data.scores={tmp_path / 'scores'}"
    json_file = Path("ds_configs/zero0.json")
    return Cell(tmp_path / "cell", variant, "lvmae_events", (scores,), 0, None, json_file)


def write_scores(folder: Path, **changed: object) -> None:
    spec = ScoreSpec(
        manifest="a" * 64, scorer="flow", settings=changed, stride=1, size=(24, 24), patch=(2, 4, 4)
    )
    folder.mkdir(exist_ok=True)
    contents = ScoreContents(spec=spec, files=(), unreadable={})
    (folder / SCORES).write_text(contents.model_dump_json())


def finish(made: Cell) -> None:
    data = {**DATA, "scores": made.scores()}
    (made.folder / RESULT).write_text(json.dumps({"linear": 50.0, "data": data}))


def test_a_cell_finished_with_other_token_scores_is_refused(tmp_path: Path) -> None:
    made = cell(tmp_path)
    write_scores(tmp_path / "scores")
    finish(made)
    require_same(made, DATA)
    write_scores(tmp_path / "scores", levels=5)
    with pytest.raises(UserError, match="finished with other scores"):
        require_same(made, DATA)


def test_scores_that_are_not_there_are_said_before_any_cell_starts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished token scores"):
        require_same(cell(tmp_path), DATA)
    require_same(cell(tmp_path, UNTRAINED), DATA)
