"""Recipes of detection: the published numbers, and what boxes do not allow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from arvideo_ds.config import DetectRecipe, load_recipe
from arvideo_ds.config.load import validate
from arvideo_ds.errors import UserError
from arvideo_ds.planning.plan import make_plan
from arvideo_ds.train.settle import RunOptions, settle

NAME = "detect_vit_b_ava"
BATCHES = ("max_steps", "total_batch", "micro_batch")
JSON = Path(__file__).parents[2] / "ds_configs" / "zero1.json"


def load(*overrides: str) -> DetectRecipe:
    return load_recipe(NAME, overrides, DetectRecipe)


def test_it_follows_the_published_protocol() -> None:
    """VideoMAE-Action-Detection; docs/detection.md has the line of each number."""
    recipe = load()
    train, data, optim = recipe.train, recipe.data, recipe.optim
    detect, evaluation = recipe.detect, recipe.evaluation
    assert (train.epochs, train.total_batch, optim.warmup_epochs) == (30, 32 * 4, 5)
    assert (optim.base_lr, optim.min_lr, optim.warmup_lr) == (2.5e-4, 1e-6, 0)
    assert (optim.betas, optim.weight_decay, optim.clip) == ((0.9, 0.999), 0.05, 0)
    plan = make_plan(recipe, world_size=8)
    assert (plan.lr, plan.min_lr, plan.warmup_lr) == pytest.approx((1.25e-4, 5e-7, 0))
    assert (data.frames, data.stride, data.size) == (16, 4, (224, 224))
    assert (data.crop, data.short_side, data.flip) == ("short_side", 256, True)
    assert (data.hsv_jitter, data.randaugment, data.erase) == ((20.0, 0.1, 0.1), None, 0)
    assert (detect.layer_decay, detect.drop_path, detect.num_actions) == (0.75, 0.2, 80)
    assert (detect.train_on, detect.outside) == ("annotated", "kept")
    assert (detect.jitter, detect.norm) == ((0.2, 0.1, 0.1, 0.05), "tokens")
    assert not detect.roi_aligned
    assert (evaluation.short_side, evaluation.extend) == (256, (0.1, 0.05))
    assert (evaluation.min_score, evaluation.person_score) == (0.8, True)
    assert (evaluation.best_by, evaluation.every_epochs) == ("map_uncapped", 10)


def test_a_recipe_without_the_newer_keys_means_what_it_meant() -> None:
    """Recipes of earlier runs hold every key of their time; what is new must change nothing."""
    tree = {"task": "detect", "model": {"size": "B"}, "train": dict.fromkeys(BATCHES, 4)}
    recipe = validate(tree, "test recipe", DetectRecipe)
    detect, evaluation = recipe.detect, recipe.evaluation
    assert (detect.train_on, detect.outside, detect.norm) == ("all", "dropped", "pooled")
    assert (detect.jitter, detect.roi_aligned) == ((0, 0, 0, 0), True)
    assert (evaluation.short_side, evaluation.extend, evaluation.crops) == (None, (0, 0), 3)
    assert (evaluation.person_score, evaluation.best_by) == (False, "map")
    assert recipe.data.hsv_jitter is None


def test_a_box_larger_than_the_short_side_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.short_side=200 is smaller than data\.size"):
        load("data.short_side=200")


def test_colour_jitter_does_not_go_with_stored_scores() -> None:
    with pytest.raises(UserError, match=r"data\.hsv_jitter="):
        load("data.scores=some", "data.crop=grid", "data.flip=false")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.randaugment=rand-m7-n4-mstd0.5-inc1", "moves the picture, but not its boxes"),
        ("data.segments=true", "has no effect on clips of keyframes"),
    ],
)
def test_what_does_not_fit_clips_with_boxes_is_refused(override: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load(override)


def test_views_of_a_keyframe_stay_together() -> None:
    with pytest.raises(UserError, match=r"Raise it to 3"):
        load("evaluation.short_side=null", "evaluation.batch=2")
    assert load("evaluation.batch=2").evaluation.keyframes == 1


def test_another_task_names_its_script() -> None:
    with pytest.raises(UserError, match=r"start it with `arvideo detect`"):
        load_recipe(NAME)


def test_files_of_boxes_are_looked_for_before_any_work(
    ava_recipe: Callable[..., DetectRecipe], tmp_path: Path
) -> None:
    shards = str(ava_recipe().data.shards)
    start = (f"data.shards={shards}", "train.max_steps=1", "detect.train_on=all")
    with pytest.raises(UserError, match=r"detect\.annotations is not given"):
        settle(RunOptions(NAME, JSON, start), DetectRecipe, world_size=1)
    for key in ("detect.annotations", "detect.detections", "evaluation.excluded"):
        missing = f"{key}={tmp_path / 'none.csv'}"
        given = (f"detect.annotations={JSON}", missing)
        with pytest.raises(UserError, match=rf"{key}=.*no such file"):
            settle(RunOptions(NAME, JSON, (*start, *given)), DetectRecipe, world_size=1)
    with pytest.raises(UserError, match=r"evaluation\.shards=.*has no shards"):
        given = (f"detect.annotations={JSON}", f"evaluation.shards={tmp_path}")
        settle(RunOptions(NAME, JSON, (*start, *given)), DetectRecipe, world_size=1)
