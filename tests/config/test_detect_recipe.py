"""Recipes of detection: METHOD's numbers, and what boxes do not allow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from arvideo_ds.config import DetectRecipe, load_recipe, make_plan
from arvideo_ds.errors import UserError
from arvideo_ds.train.settle import Options, settle

NAME = "detect_vit_b_ava"
JSON = Path(__file__).parents[2] / "ds_configs" / "zero1.json"


def load(*overrides: str) -> DetectRecipe:
    return load_recipe(NAME, overrides, DetectRecipe)


def test_it_follows_the_published_protocol() -> None:
    recipe = load()
    assert (recipe.train.epochs, recipe.train.total_batch) == (30, 128)
    assert (recipe.optim.base_lr, recipe.optim.betas) == (2.5e-4, (0.9, 0.999))
    assert (recipe.detect.layer_decay, recipe.detect.drop_path) == (0.75, 0.2)
    assert (recipe.data.frames, recipe.data.stride) == (16, 4)
    assert (recipe.detect.min_score, recipe.evaluation.min_score) == (0.9, 0.8)
    assert recipe.detect.num_actions == 80
    assert make_plan(recipe, world_size=8).lr == pytest.approx(2.5e-4 * 128 / 256)


def test_what_would_leave_boxes_behind_is_refused() -> None:
    with pytest.raises(UserError, match="boxes would stay behind"):
        load("data.randaugment=rand-m7-n4-mstd0.5-inc1")


def test_views_of_a_keyframe_stay_together() -> None:
    with pytest.raises(UserError, match=r"Raise it to 3"):
        load("evaluation.batch=2")


def test_another_task_names_its_script() -> None:
    with pytest.raises(UserError, match=r"start it with scripts/detect\.py"):
        load_recipe(NAME)


def test_files_of_boxes_are_looked_for_before_any_work(
    ava_recipe: Callable[..., DetectRecipe], tmp_path: Path
) -> None:
    shards = str(ava_recipe().data.shards)
    start = (f"data.shards={shards}", "train.max_steps=1")
    with pytest.raises(UserError, match=r"detect\.annotations is not given"):
        settle(Options(NAME, JSON, start), DetectRecipe, world_size=1)
    for key in ("detect.annotations", "detect.detections", "evaluation.excluded"):
        missing = f"{key}={tmp_path / 'none.csv'}"
        given = (f"detect.annotations={JSON}", missing)
        with pytest.raises(UserError, match=rf"{key}=.*no such file"):
            settle(Options(NAME, JSON, (*start, *given)), DetectRecipe, world_size=1)
    with pytest.raises(UserError, match=r"evaluation\.shards=.*holds no shards"):
        given = (f"detect.annotations={JSON}", f"evaluation.shards={tmp_path}")
        settle(Options(NAME, JSON, (*start, *given)), DetectRecipe, world_size=1)
