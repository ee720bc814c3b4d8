"""The Slurm array that runs cells, and what is said where there is no Slurm."""

from __future__ import annotations

from pathlib import Path

import pytest

from arvideo_ds.ablation import array
from arvideo_ds.errors import UserError


def test_the_array_has_a_task_for_each_cell_that_is_left() -> None:
    words = array.sbatch_command(
        [0, 3, 4],
        ["paper", "--seeds=2", "--output=runs/a b"],
        output=Path("runs/a b"),
        jobs=2,
        options="--nodes 2 --comment 'two words'",
    )
    assert words[0] == "sbatch"
    assert "--array=0,3,4%2" in words
    assert "--output=runs/a b/slurm-%A_%a.log" in words
    script = words.index("scripts/slurm/pretrain.sbatch")
    # Options of sbatch stand before the script, those of the cell behind it.
    assert words[script - 4 : script] == ["--nodes", "2", "--comment", "two words"]
    assert words[script + 1 :] == ["--cell=%a", "paper", "--seeds=2", "--output=runs/a b"]
    free = array.sbatch_command([1], [], output=Path("x"), jobs=None, options="")
    assert "--array=1" in free


def test_without_slurm_the_error_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="there is no sbatch on this machine"):
        array.submit(["sbatch"], tmp_path)
    assert array.waiting_job(tmp_path) is None
