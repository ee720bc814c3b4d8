"""A task is a recipe and a specification: all that depends on it is there, open to plugins."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arvideo_ds.cli import COMMANDS
from arvideo_ds.config import RECIPES, PretrainRecipe, Recipe, load_recipe
from arvideo_ds.tasks import TASKS, task_of
from arvideo_ds.train.metrics import Console
from tests.conftest import ROOT

PLUGIN = """
from typing import Any, ClassVar, Literal

from arvideo_ds.config import EncoderRecipe, RECIPES
from arvideo_ds.config.finetune import EvaluationSettings
from arvideo_ds.tasks import TASKS, Task


@RECIPES.register("caption")
class CaptionRecipe(EncoderRecipe):
    purpose: ClassVar[str] = "caption"
    script: ClassVar[str] = "caption"
    run_name: ClassVar[str] = "a captioning run"
    tested_by: ClassVar[str] = "evaluate_captions"
    task: Literal["caption"] = "caption"
    evaluation: EvaluationSettings = EvaluationSettings()


@TASKS.register("caption")
class Captioning(Task):
    def check(self, plan: Any, shards: Any, validation: Any) -> None: ...
    def model_words(self) -> str: return "captioner"
    def token_words(self, plan: Any) -> str: return ""
    def metric_words(self, metrics: Any) -> str: return ""
    def build(self, shards: Any) -> Any: ...
    def validation(self, shards: Any) -> Any: ...
"""
RECIPE = """
task: caption
model: {size: tiny}
data: {num_videos: 64, frames: 8, size: 32}
train: {epochs: 2, total_batch: 8, micro_batch: 8}
"""


def test_every_recipe_has_a_specification_and_the_words_of_messages() -> None:
    assert list(TASKS) == list(RECIPES)
    for name, recipe in RECIPES.items():
        assert recipe.model_fields["task"].default == name
        assert {recipe.script, recipe.tested_by} <= COMMANDS.keys()


def test_nothing_but_settings_asks_which_recipe_it_has() -> None:
    rooms = (path for path in (ROOT / "arvideo_ds").rglob("*.py") if path.parent.name != "config")
    asking = [path for path in rooms if re.search(r"isinstance\(.*Recipe\)", path.read_text())]
    assert not asking


def test_a_plugin_adds_a_task_and_a_dry_run_plans_it(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin, recipe = tmp_path / "captions.py", tmp_path / "captions.yaml"
    plugin.write_text(PLUGIN)
    recipe.write_text(RECIPE)
    code = (
        "from pathlib import Path\n"
        "from arvideo_ds.config import Recipe\n"
        "from arvideo_ds.train.settle import RunOptions, settle\n"
        f"options = RunOptions({str(recipe)!r}, Path('ds_configs/zero1.json'))\n"
        "settings = settle(options, Recipe, world_size=2)\n"
        "print(settings.task.model_words(), settings.plan.steps, settings.plan.encoder_tokens)"
    )
    # A process of its own: the tables keep what is registered.
    monkeypatch.setenv("ARVIDEO_PLUGINS", str(plugin))
    done = run(sys.executable, "-c", code)
    assert done.stdout.split() == ["captioner", "16", "256"], done.stderr


@pytest.mark.parametrize(
    ("recipe", "metrics", "words"),
    [
        ("demo", {"knn": 50.0}, "nearest neighbours 50.00 %"),
        ("finetune_vit_b_k400", {"top1": 50.0, "loss": 1}, "validation top-1 50.00 %"),
        (
            "detect_vit_b_ava",
            {"map": 20.0, "map_uncapped": 25.0},
            "validation mAP 20.00 % (all rows: 25.00 %)",
        ),
        (
            "tokenizer_demo",
            {"psnr_db": 20.0, "ssim": 0.5, "code_usage": 0.25},
            "PSNR 20.00 dB, SSIM 0.500, codes used 25.0 %",
        ),
    ],
)
def test_the_console_prints_what_the_task_s_validation_measured(
    recipe: str, metrics: dict[str, float], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    task = task_of(load_recipe(recipe, [], Recipe))
    names = ("lr", "throughput/clips_per_s", "time/data_wait_pct", "time/step_s", "epoch")
    names += ("memory/peak_gib", "data/skipped_total", "guard/refused_total")
    names += ("time/forward_s_max", "time/forward_s_median", f"loss/{task.recipe.task}")
    logged = {"step": 5, **dict.fromkeys(names, 0.0)}
    console = Console(10, task)
    console.log(logged)
    console.log({**logged, **{f"validation/{name}": value for name, value in metrics.items()}})
    plain, validated = capsys.readouterr().out.splitlines()
    assert validated == f"{plain}  {words}"


@pytest.mark.parametrize("probe", [None, 1.0])
def test_a_start_makes_the_synthetic_sets_that_the_run_reads(
    probe: float | None, tiny: Callable[..., PretrainRecipe]
) -> None:
    shards = {"train_shards": "data/events/train", "test_shards": "data/events/test"}
    recipe = tiny(data={"shards": "data/demo/train"}, probe={**shards, "every_epochs": probe})
    assert task_of(recipe).sets_to_make() == ["demo"] + ["events"] * (probe is not None)


def test_a_run_that_needs_scores_makes_no_sets_by_itself() -> None:
    recipe = load_recipe("lvmae_events")
    assert recipe.needs_scores
    assert not task_of(recipe).sets_to_make()
