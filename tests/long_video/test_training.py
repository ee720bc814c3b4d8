"""The tokenizer's task: what its loss is made of, and what it leaves out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models import vgg16

from arvideo_ds.config import TokenizerRecipe, load_recipe
from arvideo_ds.data.loader import Batch
from arvideo_ds.errors import UserError
from arvideo_ds.long_video.tokenizer import Reconstruction
from arvideo_ds.long_video.training import TrainTokenizer, load_perceptual
from arvideo_ds.models.cubes import unit_pixels

SMALL = ("tokenizer.filters=4", "tokenizer.samples=8", "data.frames=8", "data.size=16")


def recipe_of(*overrides: str) -> TokenizerRecipe:
    return load_recipe("tokenizer_demo", [*SMALL, *overrides], TokenizerRecipe)


def task_of(recipe: TokenizerRecipe) -> TrainTokenizer:
    torch.manual_seed(0)
    return TrainTokenizer(recipe)


def batch_of(recipe: TokenizerRecipe, *valid: bool) -> Batch:
    generator = torch.Generator().manual_seed(1)
    shape = (len(valid), *recipe.clip, 3)
    return Batch(
        torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
        torch.arange(len(valid)),
        torch.full((len(valid),), -1),
        torch.tensor(valid),
    )


def test_the_loss_is_the_mean_squared_error_of_the_clips_that_decoded() -> None:
    recipe = recipe_of("tokenizer.pixel_weight=3")
    task = task_of(recipe)
    batch = batch_of(recipe, True, False, True)
    made = task.model(batch.clips, batch.keys).pixels
    errors = (made - unit_pixels(batch.clips)).square().flatten(1).mean(1)
    torch.testing.assert_close(task(batch), 3 * errors[[0, 2]].mean())
    assert task(batch_of(recipe, False, False)) == 0
    with torch.no_grad():
        assert isinstance(task.eval()(batch), Reconstruction)


def test_the_keys_alone_decide_the_loss() -> None:
    recipe = recipe_of("tokenizer.sigma=1.0")
    task, batch = task_of(recipe), batch_of(recipe, True, True)
    first = task(batch)
    torch.manual_seed(5)
    assert torch.equal(first, task(batch))
    batch.keys = batch.keys + 10
    assert not torch.equal(first, task(batch))


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """torchvision's state of VGG16, of its features alone, with random values."""
    with torch.device("meta"):
        features = vgg16(weights=None, init_weights=False).features
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Any] = {}
    for name, value in features.state_dict().items():
        drawn = torch.randn(value.shape, generator=generator)
        state[f"features.{name}"] = drawn * (2 / max(1, value[0].numel())) ** 0.5
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(state, path)
    return path


def test_the_perceptual_loss_adds_to_it_and_belongs_to_no_optimiser(network: Path) -> None:
    recipe = recipe_of("tokenizer.perceptual_weight=0.5", f"tokenizer.perceptual_network={network}")
    task, plain, batch = task_of(recipe), task_of(recipe_of()), batch_of(recipe, True)
    look = load_perceptual(recipe.tokenizer)
    assert look is not None
    made, clips = plain.model(batch.clips, batch.keys).pixels, unit_pixels(batch.clips)
    torch.testing.assert_close(task(batch), plain(batch) + 0.5 * look(made, clips).mean())
    names = [name for name, _ in task.named_parameters()]
    assert names == [name for name, _ in plain.named_parameters()]
    # It sees a difference, and none where there is none; and its slope reaches the picture.
    assert look(clips, clips).item() == 0
    near, far = (look((clips + by * torch.randn_like(clips)), clips).item() for by in (0.01, 0.3))
    assert 0 < near < far
    made = made.detach().requires_grad_()
    look(made, clips).sum().backward()
    assert made.grad is not None and made.grad.abs().max() > 0


def test_another_network_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save({"features.0.weight": torch.zeros(1)}, path)
    recipe = recipe_of("tokenizer.perceptual_weight=0.5", f"tokenizer.perceptual_network={path}")
    with pytest.raises(UserError, match="is not torchvision's vgg16"):
        load_perceptual(recipe.tokenizer)
