"""The folder of a run: one recipe, and records that survive a restart."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from arvideo_ds.config import PretrainRecipe, Recipe, load_recipe, recipe_names
from arvideo_ds.errors import UserError
from arvideo_ds.planning.plan import make_plan
from arvideo_ds.runs import run_folder
from arvideo_ds.train.settle import RunOptions, settle
from tests.conftest import ROOT

Tiny = Callable[..., PretrainRecipe]


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_comes_back_from_its_folder_as_it_was(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name, ["data.crop_area=[0.1, 1.0]"], Recipe)
    run_folder.write_recipe(tmp_path, recipe)
    assert run_folder.read_recipe(tmp_path, Recipe) == recipe
    run_folder.require_same_mathematics(tmp_path, recipe)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("optim", "base_lr", 5e-3),
        ("optim", "betas", [0.9, 0.99]),
        ("train", "max_steps", 5),
        ("train", "total_batch", 16),
        ("train", "seed", 1),
        ("train", "precision", "bf16"),
        ("data", "repeats", 2),
        ("data", "num_streams", 24),
        ("objective", "drop_ratio", 0.9),
        ("decoder", "depth", 1),
    ],
)
def test_going_on_with_other_mathematics_is_refused_with_both_values(
    section: str, key: str, value: object, tiny: Tiny, tmp_path: Path
) -> None:
    before = tiny()
    run_folder.write_recipe(tmp_path, before)
    with pytest.raises(UserError) as raised:
        run_folder.require_same_mathematics(tmp_path, tiny(**{section: {key: value}}))
    message = str(raised.value)
    was = before.model_dump(mode="json")[section][key]
    assert f"{section}.{key} was {was!r}, is {value!r}" in message
    assert "--output" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("data", "frames", 16),
        ("data", "size", [64, 64]),
        ("model", "patch", [2, 8, 8]),
        ("model", "positions", "sincos_3d"),
        ("objective", "drop_ratio", 0.9),
        ("decoder", "depth", 1),
        ("train", "total_batch", 16),
        ("train", "seed", 1),
        # Its moments mean something else.
        ("optim", "name", "other"),
    ],
)
def test_resuming_into_another_clip_model_or_order_is_refused_with_both_values(
    section: str, key: str, value: Any, tiny: Tiny, tmp_path: Path
) -> None:
    parent = tiny()
    run_folder.write_recipe(tmp_path, parent)
    was = parent.model_dump(mode="json")[section][key]
    with pytest.raises(UserError) as raised:
        run_folder.require_resumable(tmp_path, tiny(**{section: {key: value}}))
    message = str(raised.value)
    assert f"{section}.{key} was {was!r}, is {value!r}" in message
    assert f"--init-from {tmp_path}" in message
    assert "in place of --resume" in message


def test_a_resumed_run_may_be_longer_and_faster(tiny: Tiny, tmp_path: Path) -> None:
    run_folder.write_recipe(tmp_path, tiny())
    other = tiny(
        train={"max_steps": 99, "precision": "bf16", "micro_batch": 2},
        optim={"base_lr": 1e-3, "warmup_steps": 1, "weight_decay": 0.0},
        probe={"clips": 2},
    )
    run_folder.require_resumable(tmp_path, other)


def test_a_dry_run_refuses_to_resume_what_does_not_fit(tiny: Tiny, tmp_path: Path) -> None:
    """Before anything is started; a run that has its own checkpoints is past that question."""
    parent, output, path = tmp_path / "parent", tmp_path / "child", tmp_path / "recipe.yaml"
    parent.mkdir()
    run_folder.write_recipe(parent, tiny())
    run_folder.write_recipe(tmp_path, tiny())
    config = ROOT / "ds_configs" / "zero2.json"

    def settled(*overrides: str) -> None:
        options = RunOptions(str(path), config, overrides, output=output, resume=parent)
        settle(options, PretrainRecipe, world_size=1)

    settled("train.max_steps=9")
    with pytest.raises(UserError, match=r"data\.size was \[32, 32\], is \[64, 64\]"):
        settled("data.size=[64,64]")
    (output / "checkpoints" / "step-00000002").mkdir(parents=True)
    settled("data.size=[64,64]")


def test_a_recipe_from_before_a_key_existed_has_its_default(tiny: Tiny, tmp_path: Path) -> None:
    tree = tiny().model_dump(mode="json")
    for section in ("optim", "model"):
        del tree[section]["name"]
    (tmp_path / run_folder.RECIPE).write_text(yaml.safe_dump(tree))
    run_folder.require_same_mathematics(tmp_path, tiny())
    run_folder.require_resumable(tmp_path, tiny())
    with pytest.raises(UserError, match=r"optim\.name was 'adamw', is 'other'"):
        run_folder.require_same_mathematics(tmp_path, tiny(optim={"name": "other"}))


def test_what_changes_no_number_may_change(tiny: Tiny, tmp_path: Path) -> None:
    run_folder.write_recipe(tmp_path, tiny())
    other = tiny(
        train={"log_every": 7, "save_every": 9, "micro_batch": 2, "keep_checkpoints": 5},
        data={"workers": 3, "shards": "/elsewhere", "num_videos": 49},
        wandb={"mode": "offline"},
    )
    run_folder.require_same_mathematics(tmp_path, other)


def test_a_folder_without_a_run_takes_any_recipe_and_has_none_to_read(
    tiny: Tiny, tmp_path: Path
) -> None:
    run_folder.require_same_mathematics(tmp_path, tiny())
    with pytest.raises(UserError, match=r"expected a pretraining run, but .* has no recipe"):
        run_folder.read_recipe(tmp_path, PretrainRecipe)


def test_facts_are_added_to_the_summary(tmp_path: Path) -> None:
    assert run_folder.update_summary(tmp_path, {"steps": 4, "loss": 1.5}) == {
        "steps": 4,
        "loss": 1.5,
    }
    whole = run_folder.update_summary(tmp_path, {"steps": 8, "knn": 0.5})
    assert whole == {"steps": 8, "loss": 1.5, "knn": 0.5}
    assert json.loads((tmp_path / run_folder.SUMMARY).read_text()) == whole
    assert [path.name for path in tmp_path.iterdir()] == [run_folder.SUMMARY]


def test_a_checkpoint_of_other_rates_is_refused_with_the_keys_that_give_them(
    tiny: Callable[..., PretrainRecipe], tmp_path: Path
) -> None:
    """Rates once followed clips; the same recipe must not continue at another rate unnoticed."""
    plan = make_plan(tiny(data={"repeats": 2}), world_size=1)
    run_folder.require_same_rates(tmp_path, plan.as_dict(), plan)
    run_folder.require_same_rates(tmp_path, None, plan)
    before = {**plan.as_dict(), "lr": plan.lr * 2}
    with pytest.raises(UserError, match=r"lr was .* optim\.base_lr=0\.008\.$"):
        run_folder.require_same_rates(tmp_path, before, plan)


def test_phases_are_mathematics_except_their_micro_batches(tmp_path: Path) -> None:
    run_folder.write_recipe(tmp_path, load_recipe("demo_phases"))
    for free in ("phases.0.train.micro_batch=4", "data.workers=1"):
        run_folder.require_same_mathematics(tmp_path, load_recipe("demo_phases", [free]))
    for overrides in (["phases.0.data.frames=4"], ["phases=null"]):
        with pytest.raises(UserError, match="phases was"):
            run_folder.require_same_mathematics(tmp_path, load_recipe("demo_phases", overrides))
    run_folder.write_recipe(tmp_path, load_recipe("demo"))
    with pytest.raises(UserError, match="phases was"):
        run_folder.require_same_mathematics(tmp_path, load_recipe("demo_phases"))
