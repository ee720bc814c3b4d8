"""A finished cell is asked again only with what it was finished with."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from arvideo_ds.ablation.cell import RESULT, Cell, _costs, cells_of, require_same
from arvideo_ds.ablation.grid import UNTRAINED, read_grid, resolve
from arvideo_ds.config import load_recipe
from arvideo_ds.errors import UserError
from arvideo_ds.long_video.score_store import SCORES, ScoreContents, ScoreSpec
from arvideo_ds.planning.cost import cost_of

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
    data = {**DATA, **made.sources()}
    (made.folder / RESULT).write_text(json.dumps({"linear": 50.0, "data": data}))


def test_a_cell_finished_with_other_token_scores_is_refused(tmp_path: Path) -> None:
    made = cell(tmp_path)
    write_scores(tmp_path / "scores")
    finish(made)
    require_same(made, DATA)
    write_scores(tmp_path / "scores", levels=5)
    with pytest.raises(UserError, match="finished with other scores"):
        require_same(made, DATA)


def test_a_cell_finished_from_other_pretrained_weights_is_refused(tmp_path: Path) -> None:
    def begun_with(weights: str) -> Cell:
        override = f"finetune.init_from={tmp_path / weights}"
        return Cell(tmp_path, "start", "finetune_demo", (override,), 0, None, tmp_path)

    finish(begun_with("mine"))
    require_same(begun_with("mine"), DATA)
    with pytest.raises(UserError, match="finished with other init_from"):
        require_same(begun_with("other"), DATA)


def test_scores_that_are_not_there_are_said_before_any_cell_starts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished token scores"):
        require_same(cell(tmp_path), DATA)
    require_same(cell(tmp_path, UNTRAINED), DATA)


def test_seeds_of_a_variant_are_one_group_of_wandb_where_it_is_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)

    def groups(*overrides: str) -> dict[str, set[str | None]]:
        plan = resolve(read_grid("motion"), overrides)
        cells = cells_of(
            plan, seeds=2, output=tmp_path / "my grid: 1", deepspeed_config=tmp_path,
            overrides=overrides,
        )  # fmt: skip
        settings = [(cell.variant, cell.seed, cell.settings().wandb) for cell in cells]
        on = overrides or "WANDB_MODE" in os.environ
        assert all((f"seed {seed}" in wandb.tags) is bool(on) for _, seed, wandb in settings)
        return {name: {w.group for n, _, w in settings if n == name} for name, *_ in settings}

    assert set.union(*groups().values()) == {None}
    found = groups("wandb.mode=offline")
    assert all(len(names) == 1 for names in found.values())
    assert len(set.union(*found.values())) == len(found)
    assert "my grid: 1/untrained" in found["untrained"]
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert groups() == found


def test_a_group_of_wandb_that_was_given_is_kept(tmp_path: Path) -> None:
    given = ("wandb.mode=offline", "wandb.group=mine")
    plan = resolve(read_grid("motion"), given)
    cells = cells_of(plan, seeds=1, output=tmp_path, deepspeed_config=tmp_path, overrides=given)
    assert {cell.settings().wandb.group for cell in cells} == {"mine"}


def test_minutes_are_of_all_steps_and_operations_of_all_phases(tmp_path: Path) -> None:
    """Phases have steps of different lengths: neither the median nor the last phase tells them."""
    recipe = load_recipe("demo_phases")
    made = Cell(tmp_path, "row", "demo_phases", (), 0, None, tmp_path)
    lines = [{"step": 30, "time/step_s": 1.0}, {"step": 80, "time/step_s": 2.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    costs = _costs(made, recipe)
    assert costs["minutes"] == round((30 * 1.0 + 50 * 2.0) / 60, 3)
    small, large = (cost_of(phase).flops_forward_per_clip / 1e9 for phase in recipe.by_phase())
    assert costs["gflops_forward_per_clip"] == pytest.approx(0.8 * small + 0.2 * large, abs=1e-4)
