"""A run's folder for other commands: which weights, whose files, and what it is not for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from arvideo_ds.config import FinetuneRecipe, PretrainRecipe
from arvideo_ds.errors import UserError
from arvideo_ds.runs import run_folder


def test_the_best_weights_are_used_where_there_are_any(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Continue the run first"):
        run_folder.choose_weights(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert run_folder.choose_weights(tmp_path) == "last"
    (tmp_path / "best.safetensors").touch()
    assert run_folder.choose_weights(tmp_path) == "best"
    assert run_folder.choose_weights(tmp_path, "last") == "last"
    with pytest.raises(UserError, match="with an ema_decay"):
        run_folder.choose_weights(tmp_path, "ema")


@pytest.mark.parametrize("mark", ["manifest.json", "index.jsonl", "parity.json"])
def test_nobody_writes_among_another_command_s_files(mark: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").touch()
    run_folder.require_own(tmp_path, "recipe.yaml")
    (tmp_path / mark).touch()
    with pytest.raises(UserError, match=rf"contains .*\({mark}\); choose another folder"):
        run_folder.require_own(tmp_path, "recipe.yaml")


def test_a_run_of_another_task_is_named_with_what_judges_it(
    tiny: Callable[..., PretrainRecipe], tmp_path: Path
) -> None:
    run_folder.write_recipe(tmp_path, tiny())
    with pytest.raises(UserError, match=r"is a pretraining run; .*`arvideo probe`"):
        run_folder.read_recipe(tmp_path, FinetuneRecipe)
