"""Soups: the mean by hand, greedy choices by hand, and a script whose output is a run."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from arvideo_ds.config import FinetuneRecipe
from arvideo_ds.errors import UserError
from arvideo_ds.evaluation.soup import State, greedy_soup, uniform_soup
from arvideo_ds.models.classifier import Classifier
from arvideo_ds.runs import run_folder
from tests.conftest import ROOT, run_script


def state(value: float) -> State:
    return {"w": torch.tensor([value])}


def test_the_uniform_soup_is_the_mean() -> None:
    assert uniform_soup([state(1.0), state(2.0), state(6.0)])["w"].item() == 3
    half = [{"w": torch.tensor([value], dtype=torch.bfloat16)} for value in (1.0, 3.0)]
    assert uniform_soup(half)["w"].dtype == torch.bfloat16


def test_the_greedy_soup_keeps_what_does_not_hurt() -> None:
    # Best near 3: 4 alone is best, with 2 it is perfect, with 9 it would not be.
    soup, members, best = greedy_soup(
        [state(9.0), state(4.0), state(2.0)], lambda s: -abs(s["w"].item() - 3)
    )
    assert members == [1, 2]
    assert soup["w"].item() == 3
    assert best == 0


def test_models_of_different_shapes_are_refused() -> None:
    with pytest.raises(UserError, match="model 2 and model 1 differ in w"):
        uniform_soup([state(1.0), {"w": torch.zeros(2)}])


@pytest.fixture
def runs(tiny_finetune: Callable[..., FinetuneRecipe], tmp_path: Path) -> list[Path]:
    folders = []
    for number in range(2):
        folder = tmp_path / f"run{number}"
        folder.mkdir()
        torch.manual_seed(number)
        save_file(Classifier(tiny_finetune().encoder, 3).state_dict(), folder / "model.safetensors")
        run_folder.write_recipe(folder, tiny_finetune())
        (folder / "labels.json").write_text(json.dumps(["a", "b", "c"]))
        folders.append(folder)
    return folders


@pytest.mark.parametrize("key", ["heads", "pooling"])
def test_runs_whose_classes_stand_otherwise_are_refused(
    tiny_finetune: Callable[..., FinetuneRecipe],
    runs: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    key: str,
) -> None:
    values = {"heads": (["verb", "noun"], ["noun", "verb"]), "pooling": ("mean", "attention")}
    for folder, value in zip(runs, values[key], strict=True):
        run_folder.write_recipe(folder, tiny_finetune(finetune={key: value}))
    words = ["soup.py", *map(str, runs), f"--output={tmp_path / 'soup'}"]
    monkeypatch.setattr("sys.argv", words)
    script = runpy.run_path(str(ROOT / "scripts" / "soup.py"))
    assert script["main"]() == 2
    assert f"has another finetune.{key}" in capsys.readouterr().err


@pytest.mark.slow
def test_the_script_writes_a_run(runs: list[Path], tmp_path: Path) -> None:
    script = ROOT / "scripts" / "soup.py"
    done = run_script(script, *runs, "--output", tmp_path / "soup")
    assert done.returncode == 0, done.stderr
    name = "encoder.blocks.0.attn.qkv.weight"
    parts = [load_file(folder / "model.safetensors")[name] for folder in runs]
    mixed = load_file(tmp_path / "soup" / "model.safetensors")[name]
    torch.testing.assert_close(mixed, (parts[0] + parts[1]) / 2)
    assert json.loads((tmp_path / "soup" / "summary.json").read_text())["soup"]["kind"] == "uniform"
    again = run_script(script, *runs, "--output", tmp_path / "soup")
    assert again.returncode == 2
    assert "exists already" in again.stderr


@pytest.mark.slow
def test_the_greedy_script_refuses_shards_of_other_classes(
    runs: list[Path], demo_shards: Path, tmp_path: Path
) -> None:
    script = ROOT / "scripts" / "soup.py"
    asked = ["--greedy", "--shards", demo_shards / "test", "--output", tmp_path / "soup"]
    done = run_script(script, *runs, *asked)
    assert done.returncode == 2 and "(3 and 8; 'a' only in" in done.stderr
    assert not (tmp_path / "soup").exists()


@pytest.mark.slow
def test_a_soup_is_of_different_runs_with_one_table_of_positions(
    runs: list[Path], tiny_finetune: Callable[..., FinetuneRecipe], tmp_path: Path
) -> None:
    script, asked = ROOT / "scripts" / "soup.py", ["--output", tmp_path / "soup"]
    done = run_script(script, runs[0], runs[0], *asked)
    assert done.returncode == 2 and "named twice" in done.stderr
    run_folder.write_recipe(runs[1], tiny_finetune(model={"positions": "sincos_3d"}))
    done = run_script(script, *runs, *asked)
    assert done.returncode == 2 and "another model.positions" in done.stderr
