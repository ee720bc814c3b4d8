"""Reading recipes: bases, overrides, and errors that say where and what instead."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from arvideo_ds.config import PretrainRecipe, load_recipe, recipe_names
from arvideo_ds.config.objectives import VideomaeSettings
from arvideo_ds.errors import UserError

VIT_B = "pretrain_vit_b_k400"
SMALLEST_TREE = {
    "model": {"size": "tiny"},
    "train": {"epochs": 1, "total_batch": 8, "micro_batch": 8},
}
SMALLEST = "model: {size: tiny}\ntrain: {epochs: 1, total_batch: 8, micro_batch: 8}\n"


def error_of(name: str | Path, *overrides: str) -> str:
    """The message for people; it is one paragraph, whatever is wrong."""
    with pytest.raises(UserError) as raised:
        load_recipe(str(name), overrides)
    message = str(raised.value)
    assert message.strip()
    assert "\n" not in message
    return message


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("train.total_batchs=64", "train.total_batch"),
        ("objective.droprate=0.9", "objective.drop_ratio"),
        ("train.micro_batc=1", "train.micro_batch"),
        # The right key in the wrong section.
        ("model.drop_ratio=0.9", "objective.drop_ratio"),
        # A typo in the section's name.
        ("modle.size=B", "model"),
        ("objectiv.cluster=[1,7,7]", "objective"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(typo: str, meant: str) -> None:
    message = error_of(VIT_B, typo)
    assert "unknown key" in message
    assert f"did you mean '{meant}'?" in message


def test_an_unknown_key_unlike_any_other_gets_no_guess() -> None:
    message = error_of(VIT_B, "quetzalcoatlus=1")
    assert "unknown key 'quetzalcoatlus'" in message
    assert "did you mean" not in message


@pytest.mark.parametrize("key", ["int", "arvideo", "videomae"])
@pytest.mark.parametrize("section", ["model", "objective"])
def test_an_unknown_key_may_be_called_as_a_branch_of_the_schema_is(section: str, key: str) -> None:
    assert f"unknown key '{section}.{key}'" in error_of(VIT_B, f"{section}.{key}=3")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["objective.name=videomae", "objective.cluster=[1,7,7]"], "objective.name=videomae"),
        (["objective.mask_ratio=0.8"], "objective.name=arvideo"),
    ],
)
def test_a_setting_of_another_objective_is_said_to_be_that(
    overrides: list[str], words: str
) -> None:
    for ordered in (overrides, overrides[::-1]):
        assert f"is not a setting of {words}" in error_of(VIT_B, *ordered)


def test_another_objective_leaves_the_settings_of_the_one_below_behind() -> None:
    recipe = load_recipe(VIT_B, ["objective.mask_ratio=0.8", "objective.name=videomae"])
    assert recipe.objective == VideomaeSettings(mask_ratio=0.8)


def test_unknown_keys_in_the_file_name_the_file(tmp_path: Path) -> None:
    write(tmp_path, mine=SMALLEST + "data: {strides: 2}\n")
    message = error_of(tmp_path / "mine.yaml")
    assert "mine.yaml" in message
    assert "data.stride'" in message


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("train.epochs=many", "train.epochs"),
        ("train.epochs=1.5", "train.epochs"),
        ("train.total_batch=", "train.total_batch"),
        ("train.micro_batch=0", "train.micro_batch"),
        ("optim.base_lr=fast", "optim.base_lr"),
        ("optim.base_lr=.nan", "optim.base_lr"),
        ("optim.base_lr=true", "optim.base_lr"),  # not the learning rate 1
        ("train.seed=true", "train.seed"),
        ("data.flip=maybe", "data.flip"),
        ("model.size=XXL", "model.size"),
        ("model.patch=[2,16]", "model.patch"),
        ("data.workers=several", "data.workers"),
        ("data.crop_scales=[]", "data.crop_scales"),
        ("objective.drop_ratio=1.0", "objective.drop_ratio"),
        ("decoder.target_ratio=0", "decoder.target_ratio"),
        ("wandb.mode=onlin", "wandb.mode"),
        ("finetune.train=lora", "'finetune' belongs to another task, `arvideo finetune`"),
        ("train=5", "train"),
        ("objective=5", "objective.KEY=VALUE"),
        ("objective.name=mae", "arvideo, videomae"),
        ("objective.name=[1]", "arvideo, videomae"),
    ],
)
def test_a_wrong_value_is_named_with_its_dotted_key(override: str, key: str) -> None:
    assert re.search(rf"(?<![\w.]){re.escape(key)}(?!\w)", error_of(VIT_B, override))


@pytest.mark.parametrize(
    ("override", "advice"),
    [
        ("train.max_steps=ten", "train.max_steps='ten': must be a whole number, such as"),
        ("train.max_steps=1.5", "train.max_steps=1.5: must be a whole number, such as"),
        ("optim.base_lr=fast", "optim.base_lr='fast': must be a number, such as optim.base_lr=0.5"),
        ("data.flip=maybe", "data.flip='maybe': must be true or false"),
        ("objective.cluster=2,4,4", "'2,4,4': must be a list in brackets, such as "),
        ("objective.cluster=2,4,4", "such as objective.cluster=[2,4,4]"),
        ("objective.cluster=2x4x4", "such as objective.cluster=[2,4,4]"),
        ("objective.cluster=(2, 4, 4)", "such as objective.cluster=[2,4,4]"),
        ("objective.cluster=7", "such as objective.cluster=[2,7,7]"),
        ("objective.cluster=[2,x,4]", "objective.cluster='x': value 2 must be a whole number"),
        ("model.patch=[2,16]", "model.patch=[2, 16]: value 3 of the list is missing"),
        (
            "data.size=112,224",
            "data.size='112,224': must be a list in brackets, such as data.size=[1",
        ),
        ("optim.betas=0.9,0.95", "such as optim.betas=[0.9,0.95]"),
        ("train=5", "train.KEY=VALUE"),
        ("train.micro_batch=0", "train.micro_batch=0: must be greater than or equal to 1"),
    ],
)
def test_a_wrong_value_is_answered_with_what_to_write(override: str, advice: str) -> None:
    message = error_of(VIT_B, override)
    assert advice in message
    assert "Input" not in message
    assert "parse" not in message
    assert message.count("data.size=") <= 2


@pytest.mark.parametrize(
    ("overrides", "description"),
    [
        (["train.max_steps=ten"], "(train.max_steps: Length of the run in optimiser steps"),
        (["data.prefetch=0"], "(data.prefetch: Batches"),
        # A key that two objectives have: the description of the chosen one.
        (["objective.targets=all"], "(objective.targets: "),
        (["objective.name=lvmae", "objective.targets=all"], "(objective.targets: What is pred"),
        (["objective.cluster=[2,x,4]"], "(objective.cluster: Tokens along time, height and width"),
    ],
)
def test_an_invalid_value_ends_with_the_description_of_its_setting(
    overrides: list[str], description: str
) -> None:
    message = error_of(VIT_B, *overrides)
    assert description in message
    assert message.endswith(")")


def test_an_unknown_key_ends_without_a_description() -> None:
    assert error_of(VIT_B, "data.strid=2").endswith("did you mean 'data.stride'?")


def test_the_schema_describes_settings_as_their_docstrings_do() -> None:
    sections = PretrainRecipe.model_json_schema()["$defs"]
    fields = sections["TrainSettings"]["properties"]
    assert fields["total_batch"]["description"].startswith("Clips per optimiser step")


def test_stride_and_fps_exclude_each_other() -> None:
    assert load_recipe(VIT_B).data.stride == 4
    assert PretrainRecipe.model_validate(SMALLEST_TREE).data.stride == 4
    message = error_of(VIT_B, "data.fps=7.5")  # the recipe has a stride
    assert "data.stride=4 and data.fps=7.5 exclude each other" in message
    recipe = load_recipe(VIT_B, ["data.fps=7.5", "data.stride=null"])
    assert (recipe.data.stride, recipe.data.fps) == (None, 7.5)
    # As a run folder stores it.
    assert PretrainRecipe.model_validate(recipe.model_dump(mode="json")) == recipe
    tree = {**SMALLEST_TREE, "data": {"fps": 4}}
    assert PretrainRecipe.model_validate(tree).data.stride is None
    assert "data.stride is null" in error_of(VIT_B, "data.stride=null")


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("data.sampling=uniform", "data.fps=7.5 has no effect with data.sampling=uniform"),
        ("data.scores=folder", 'Set data.crop="grid", data.fps=null'),
        ("data.fps=0", "greater than 0"),
        ("data.fps=fast", "data.fps='fast': must be a number"),
    ],
)
def test_fps_is_refused_where_it_cannot_hold(override: str, reason: str) -> None:
    overrides = {"data.stride": "null", "data.fps": "7.5"} | dict([override.split("=")])
    assert reason in error_of(VIT_B, *(f"{key}={value}" for key, value in overrides.items()))


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    write(tmp_path, mine="model: {size: B}\n")
    assert "'train' is missing" in error_of(tmp_path / "mine.yaml")


def test_every_wrong_key_is_told_at_once() -> None:
    message = error_of(VIT_B, "train.epoch=3", "data.strid=2")
    assert "train.epochs" in message
    assert "data.stride" in message


def test_overrides_are_yaml() -> None:
    recipe = load_recipe(
        VIT_B,
        [
            "optim.base_lr=1e-3",  # YAML 1.1 alone reads a string here
            "objective.cluster=[1, 7, 7]",
            "data.crop_scales=[1.0]",
            "data.flip=true",
            "train.epochs=null",
            "train.max_steps=10",
            "data.shards=/data/a=b",
            "decoder.width=384",
        ],
    )
    assert recipe.optim.base_lr == 1e-3
    assert recipe.objective.cluster == (1, 7, 7)
    assert recipe.data.crop_scales == (1.0,)
    assert recipe.data.flip is True
    assert (recipe.train.epochs, recipe.train.max_steps) == (None, 10)
    assert recipe.data.shards == "/data/a=b"
    assert recipe.decoder.width == 384


def test_a_later_override_wins_and_others_stay() -> None:
    recipe = load_recipe(VIT_B, ["train.epochs=3", "train.epochs=5"])
    plain = load_recipe(VIT_B)
    assert recipe.train.epochs == 5
    assert recipe == plain.model_copy(update={"train": recipe.train})
    assert recipe.train.total_batch == plain.train.total_batch


def test_a_scalar_size_is_a_square() -> None:
    assert load_recipe(VIT_B, ["data.size=112"]).data.size == (112, 112)
    wide = load_recipe(VIT_B, ["data.size=[112, 224]"])
    assert wide.geometry.grid == (8, 7, 14)


@pytest.mark.parametrize("override", ["train.epochs", "=3", "train..epochs=3", "train.seed=["])
def test_what_is_no_override_is_quoted_back(override: str) -> None:
    assert f"'{override}'" in error_of(VIT_B, override)


def test_a_value_is_no_section() -> None:
    assert "train.epochs is a value" in error_of(VIT_B, "train.epochs.more=3")


def test_a_recipe_lies_over_its_base_key_by_key(tmp_path: Path) -> None:
    write(
        tmp_path,
        bottom=SMALLEST + "optim: {base_lr: 1.0e-3, clip: 0.5}\ndata: {frames: 8, size: 32}\n",
        middle="base: bottom\noptim: {clip: 1.0}\nobjective: {cluster: [2, 4, 4]}\n",
        top="base: middle\noptim: {weight_decay: 0}\nobjective: {cluster: [1, 8, 8]}\n",
    )
    recipe = load_recipe(str(tmp_path / "top.yaml"))
    assert (recipe.optim.base_lr, recipe.optim.clip, recipe.optim.weight_decay) == (1e-3, 1.0, 0)
    assert recipe.objective.cluster == (1, 8, 8)
    assert recipe.data.frames == 8


def test_a_base_may_come_with_the_package_and_a_neighbour_goes_first(tmp_path: Path) -> None:
    write(tmp_path, mine=f"base: {VIT_B}\ntrain: {{epochs: 3}}\n")
    assert load_recipe(str(tmp_path / "mine.yaml")).train.epochs == 3
    assert load_recipe(str(tmp_path / "mine.yaml")).model == load_recipe(VIT_B).model
    geometry = "data: {frames: 8, size: 32}\nobjective: {cluster: [2, 4, 4]}\n"
    (tmp_path / f"{VIT_B}.yaml").write_text(SMALLEST + geometry)
    assert load_recipe(str(tmp_path / "mine.yaml")).model.size == "tiny"


def test_bases_that_name_each_other_are_an_error_with_the_chain(tmp_path: Path) -> None:
    write(tmp_path, a="base: b\n", b="base: c\n", c="base: a\n", alone="base: alone\n")
    assert "a.yaml -> b.yaml -> c.yaml -> a.yaml" in error_of(tmp_path / "a.yaml")
    assert "alone.yaml -> alone.yaml" in error_of(tmp_path / "alone.yaml")


def test_a_missing_base_names_the_recipe_that_asks_for_it(tmp_path: Path) -> None:
    write(tmp_path, mine="base: pretrain_bas\n")
    message = error_of(tmp_path / "mine.yaml")
    assert "pretrain_bas" in message
    assert "mine.yaml" in message


@pytest.mark.parametrize(
    "text",
    ["model: [\nx: : y\n", "\tmodel: x\n", "", "- a\n- b\n", "model: {size: !!python/name:os}\n"],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, text: str) -> None:
    write(tmp_path, broken=text)
    assert "broken.yaml" in error_of(tmp_path / "broken.yaml")


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_bytes(b"\xff\xfe\x00model")
    assert "broken.yaml" in error_of(tmp_path / "broken.yaml")


def test_an_unknown_name_suggests_the_nearest_recipe() -> None:
    assert f"Did you mean '{VIT_B}'?" in error_of("pretrain_vitb_k400")


@pytest.mark.parametrize("name", ["", "../recipes/demo", "demo*", "no/such.yaml"])
def test_names_that_are_no_recipe_list_those_there_are(name: str) -> None:
    message = error_of(name)
    assert all(known in message for known in recipe_names())


def test_a_recipe_cannot_be_changed_after_reading() -> None:
    recipe = load_recipe(VIT_B)
    with pytest.raises(Exception, match="frozen"):
        recipe.train.seed = 3  # type: ignore[misc]
    assert isinstance(recipe, PretrainRecipe)
