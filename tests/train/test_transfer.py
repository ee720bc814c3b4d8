"""Which table of positions a transferred encoder gets, and that the recipe alone rebuilds it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from arvideo_ds.config import DetectRecipe, FinetuneRecipe, PretrainRecipe, Recipe
from arvideo_ds.errors import UserError
from arvideo_ds.models.classifier import Classifier
from arvideo_ds.models.positions import interpolated_positions, position_table
from arvideo_ds.runs import run_folder
from arvideo_ds.tasks.transfer import settle_transfer

Make = Callable[..., FinetuneRecipe]
WIDE = {"frames": 16, "size": 48}


@pytest.fixture
def source(tiny: Callable[..., PretrainRecipe], tmp_path: Path) -> Path:
    """A pretraining run's folder, clips of 8 x 32 x 32, as far as its recipe says."""
    folder = tmp_path / "pretrained"
    folder.mkdir()
    run_folder.write_recipe(folder, tiny())
    return folder


def table_of(recipe: Recipe) -> torch.Tensor:
    return Classifier(recipe.encoder, 2).encoder.positions


def test_another_grid_is_read_off_the_pretrained_table(
    source: Path, tiny_finetune: Make, tmp_path: Path
) -> None:
    recipe = settle_transfer(
        tiny_finetune(data=WIDE, finetune={"init_from": str(source)}), tmp_path / "run"
    )
    grid, width = recipe.geometry.grid, recipe.size.width
    assert recipe.finetune.pretrained_clip == (8, 32, 32)
    assert torch.equal(
        table_of(recipe), interpolated_positions("sincos_1d", (4, 8, 8), grid, width)
    )
    assert not torch.allclose(table_of(recipe), position_table("sincos_1d", grid, width), atol=0.1)


def test_the_run_s_own_recipe_rebuilds_the_table_without_the_source(
    source: Path, tiny_finetune: Make, tmp_path: Path
) -> None:
    asked = tiny_finetune(data=WIDE, finetune={"init_from": str(source)})
    recipe, folder = settle_transfer(asked, tmp_path / "run"), tmp_path / "run"
    folder.mkdir()
    run_folder.write_recipe(folder, recipe)
    (source / "recipe.yaml").unlink()
    assert torch.equal(table_of(run_folder.read_recipe(folder, Recipe)), table_of(recipe))
    again = settle_transfer(asked, folder)
    run_folder.require_same_mathematics(folder, again)
    assert again == recipe


def test_a_run_of_before_the_setting_goes_on_with_what_it_had(
    source: Path, tiny_finetune: Make, tmp_path: Path
) -> None:
    asked = tiny_finetune(data=WIDE, finetune={"init_from": str(source)})
    run_folder.write_recipe(tmp_path, asked)
    assert settle_transfer(asked, tmp_path) == asked
    assert torch.equal(table_of(asked), position_table("sincos_1d", (8, 12, 12), 128))


def test_equal_grids_and_no_weights_have_the_plain_table(
    source: Path, tiny_finetune: Make, tmp_path: Path
) -> None:
    for transfer in ({"init_from": str(source)}, {}):
        recipe = settle_transfer(tiny_finetune(finetune=transfer), tmp_path / "run")
        assert recipe.finetune.positions == "recomputed"
        assert torch.equal(table_of(recipe), position_table("sincos_1d", (4, 8, 8), 128))


def test_a_fine_tuned_source_passes_on_the_table_it_knows(
    source: Path, tiny_finetune: Make, tmp_path: Path
) -> None:
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    first = settle_transfer(tiny_finetune(data=WIDE, finetune={"init_from": str(source)}), tuned)
    run_folder.write_recipe(tuned, first)
    weights = tuned / "best.safetensors"
    asked = tiny_finetune(data=WIDE, finetune={"init_from": str(weights)})
    second = settle_transfer(asked, tmp_path / "second")
    assert torch.equal(table_of(second), table_of(first))


def test_detection_is_transferred_alike(
    source: Path, ava_recipe: Callable[..., DetectRecipe], tmp_path: Path
) -> None:
    asked = ava_recipe(data={"frames": 16}, detect={"init_from": str(source)})
    recipe = settle_transfer(asked, tmp_path / "run")
    assert recipe.pretrained_grid == (4, 8, 8)


def test_the_clip_of_a_transformers_folder_is_known(tiny_finetune: Make, tmp_path: Path) -> None:
    facts = {"num_frames": 8, "image_size": 32, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    asked = tiny_finetune(data=WIDE, finetune={"init_from": str(tmp_path)})
    assert settle_transfer(asked, tmp_path / "run").pretrained_grid == (4, 8, 8)


def test_a_grid_that_is_not_known_is_asked_for_and_may_be_given(
    tiny_finetune: Make, tmp_path: Path
) -> None:
    unknown = {"init_from": str(tmp_path / "vit.pth"), "positions": "interpolated"}
    with pytest.raises(UserError, match=r"pretrained_clip=\[FRAMES,HEIGHT,WIDTH\]"):
        settle_transfer(tiny_finetune(finetune=unknown), tmp_path / "run")
    given = tiny_finetune(finetune=unknown | {"pretrained_clip": [16, 64, 64]})
    assert settle_transfer(given, tmp_path / "run").pretrained_grid == (8, 16, 16)
    odd = tiny_finetune(finetune=unknown | {"pretrained_clip": [16, 63, 64]})
    with pytest.raises(UserError, match=r"not a multiple of model\.patch=\[2, 4, 4\]"):
        settle_transfer(odd, tmp_path / "run")


def test_another_encoder_than_the_source_s_is_refused_with_what_to_add(
    source: Path, tiny_finetune: Make, tmp_path: Path
) -> None:
    model = {"size": "S", "positions": "sincos_3d"}
    asked = tiny_finetune(model=model, finetune={"init_from": str(source)})
    with pytest.raises(UserError, match=r"Add model\.size=tiny model\.positions=sincos_1d,"):
        settle_transfer(asked, tmp_path / "run")
    asked = tiny_finetune(model={"patch": [2, 8, 8]}, finetune={"init_from": str(source)})
    with pytest.raises(UserError, match=r"Add model\.patch=\[2,4,4\],"):
        settle_transfer(asked, tmp_path / "run")
