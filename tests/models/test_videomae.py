"""VideoMAE: the published loss and gradients, its masks, and what may depend on what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor

from arvideo_ds.config import PretrainRecipe, load_recipe
from arvideo_ds.models.cubes import PIXEL_MEAN, PIXEL_STD, to_cubes
from arvideo_ds.models.layouts import from_huggingface
from arvideo_ds.models.selection import running_cell, tokens_of, tube
from arvideo_ds.models.videomae import VideoMAE
from arvideo_ds.randomness import draw_key
from arvideo_ds.tasks.pretrain import build_objective

Make = Callable[..., PretrainRecipe]
GRIDS = [(8, 14, 14), (4, 8, 8), (8, 16, 16), (4, 2, 6)]
DECODER_MASKS = ["none", "running_cell"]


def keys_of(count: int) -> Tensor:
    return torch.tensor([draw_key(0, 0, i, 0) for i in range(count)])


def videomae(tiny: Make, decoder_mask: str = "none", **sections: dict[str, object]) -> VideoMAE:
    objective = {"name": "videomae", "mask_ratio": 0.75, "decoder_mask": decoder_mask}
    recipe = tiny(**{"objective": objective, "model": {"positions": "sincos_1d"}, **sections})
    torch.manual_seed(0)
    return build_objective(recipe)


# ------------------------------------------------------------------------------------- parity


def huggingface_twin(recipe: PretrainRecipe) -> Any:
    """transformers' model of the recipe's shape, random weights, biases too."""
    transformers = pytest.importorskip("transformers")
    size, decoder = recipe.size, recipe.decoder_shape
    config = transformers.VideoMAEConfig(
        image_size=recipe.data.size[0], patch_size=recipe.patch[1], num_frames=recipe.data.frames,
        tubelet_size=recipe.patch[0], hidden_size=size.width, num_hidden_layers=size.depth,
        num_attention_heads=size.heads, intermediate_size=size.mlp, layer_norm_eps=1e-6,
        use_mean_pooling=False, norm_pix_loss=recipe.objective.normalize_targets,
        decoder_hidden_size=decoder.width, decoder_num_attention_heads=decoder.heads,
        decoder_num_hidden_layers=decoder.depth, decoder_intermediate_size=4 * decoder.width,
    )  # fmt: skip
    torch.manual_seed(0)
    twin = transformers.VideoMAEForPreTraining(config)
    for name, parameter in twin.named_parameters():
        if name.endswith("bias") or "mask_token" in name:
            parameter.data.normal_(std=0.02)
    # The published code has one epsilon everywhere; transformers leaves torch's own here.
    twin.decoder.norm.eps = 1e-6
    return twin


def ours_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of transformers' VideoMAEForPreTraining to ours; biases of keys are missing."""
    encoder = {k.removeprefix("videomae."): v for k, v in state.items() if "videomae." in k}
    layers = {
        k.replace("decoder.decoder_layers.", "encoder.layer."): v
        for k, v in state.items()
        if "decoder_layers" in k
    }
    out = {f"encoder.{k}": v for k, v in from_huggingface(encoder).items()}
    out |= {
        f"decoder.{k}".replace("blocks", "layers"): v for k, v in from_huggingface(layers).items()
    }
    out["decoder.project.weight"] = state["encoder_to_decoder.weight"]
    out["decoder.mask_token"] = state["mask_token"].reshape(-1)
    for part in ("norm", "head"):
        for kind in ("weight", "bias"):
            out[f"decoder.{part}.{kind}"] = state[f"decoder.{part}.{kind}"]
    return out


SMALL = {"videomae_demo": ["data.size=32", "model.positions=sincos_1d"]}
PUBLISHED: dict[str, list[str]] = {"videomae_vit_s_k400": [], "videomae_vit_b_k400": []}


@pytest.mark.parametrize(
    "name", [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED)]
)
@pytest.mark.parametrize("normalize", [True, False])
def test_loss_and_gradients_equal_those_of_transformers(name: str, normalize: bool) -> None:
    overrides = [
        *(SMALL | PUBLISHED)[name],
        f"objective.normalize_targets={str(normalize).lower()}",
    ]
    recipe = load_recipe(name, overrides)
    twin, model = huggingface_twin(recipe), build_objective(recipe)
    missing = model.load_state_dict(ours_of(twin.state_dict()), strict=False)
    assert not missing.missing_keys and not missing.unexpected_keys
    generator = torch.Generator().manual_seed(1)
    shape = (1 if name in PUBLISHED else 3, *recipe.clip, 3)
    clips = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    keys = keys_of(len(clips))
    loss = model(clips, keys).mean()

    masked = torch.ones(len(clips), recipe.geometry.num_tokens, dtype=torch.bool)
    masked.scatter_(1, model.draw(keys).encoded, value=False)
    pixels = (clips / 255 - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)
    theirs = twin(rearrange(pixels, "b t h w c -> b t c h w"), bool_masked_pos=masked).loss
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)

    loss.backward()
    theirs.backward()
    wanted = ours_of({k: p.grad for k, p in twin.named_parameters()})
    for key, parameter in model.named_parameters():
        scale = wanted[key].abs().max().item() + 1e-12
        torch.testing.assert_close(
            parameter.grad,
            wanted[key],
            rtol=1e-3,
            atol=1e-4 * scale,
            msg=lambda m, k=key: f"{k}: {m}",
        )


# -------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("grid", GRIDS)
def test_a_tube_is_the_same_at_all_times_and_of_the_wanted_size(grid: tuple[int, int, int]) -> None:
    t, h, w = grid
    seen = tube(keys_of(20), grid, 5).view(20, t, h * w)
    assert torch.equal(seen, seen[:, :1].expand_as(seen))
    assert (seen[:, 0].sum(1) == 5).all()
    assert len({tuple(row.tolist()) for row in seen[:, 0]}) > 10


def test_every_place_is_seen_equally_often() -> None:
    share = tube(keys_of(4000), (4, 4, 4), 4).float().mean(0)
    torch.testing.assert_close(share, torch.full_like(share, 0.25), atol=0.035, rtol=0)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_running_cell_takes_two_of_four_and_each_place_twice_in_four_times(
    grid: tuple[int, int, int],
) -> None:
    t, h, w = grid
    chosen = running_cell(keys_of(30), grid).view(30, t, h, w)
    cells = rearrange(chosen, "b t (h i) (w j) -> b t h w (i j)", i=2, j=2)
    assert (cells.sum(-1) == 2).all()
    assert (chosen[:, :4].sum(1) == 2).all()
    # It moves on at every time, and starts differ between clips.
    assert (chosen[:, 1:] != chosen[:, :-1]).flatten(2).any(-1).all()
    assert len({tuple(row.flatten().tolist()) for row in chosen[:, 0]}) == 4


@pytest.mark.parametrize("decoder_mask", DECODER_MASKS)
def test_a_draw_hides_what_it_predicts_and_holds_the_planned_counts(
    tiny: Make, decoder_mask: str
) -> None:
    model = videomae(tiny, decoder_mask)
    keys = keys_of(50)
    draw = model.draw(keys)
    assert draw.encoded.shape == (50, model.counts.encoded)
    assert draw.targets.shape == (50, model.counts.predicted)
    for encoded, targets in zip(draw.encoded.tolist(), draw.targets.tolist(), strict=True):
        assert len({*encoded, *targets}) == len(encoded) + len(targets)
    alone = model.draw(keys[7:8])
    assert torch.equal(alone.encoded[0], draw.encoded[7])
    assert torch.equal(alone.targets[0], draw.targets[7])


def test_counts_of_the_published_shapes() -> None:
    plain, dual = (
        load_recipe(name).counts for name in ("videomae_vit_b_k400", "videomae_v2_vit_b_k400")
    )
    assert (plain.encoded, plain.decoded, plain.predicted) == (160, 1568, 1408)
    assert (dual.encoded, dual.decoded, dual.predicted) == (160, 864, 704)


def test_chosen_tokens_come_in_ascending_order() -> None:
    chosen = torch.tensor([[True, False, True, True], [False, True, True, True]])
    assert tokens_of(chosen, 3).tolist() == [[0, 2, 3], [1, 2, 3]]


# ---------------------------------------------------------------------------- what it looks at


@pytest.mark.parametrize("decoder_mask", DECODER_MASKS)
def test_predictions_depend_on_what_is_seen_alone(tiny: Make, decoder_mask: str) -> None:
    model = videomae(tiny, decoder_mask)
    generator = torch.Generator().manual_seed(0)
    cubes = to_cubes(torch.rand(2, 8, 32, 32, 3, generator=generator), model.patch)
    draw = model.draw(keys_of(2))
    seen = torch.zeros(cubes.shape[:2], dtype=torch.bool).scatter(1, draw.encoded, value=True)
    hidden_changed = torch.where(seen[..., None], cubes, 1 - cubes)
    seen_changed = torch.where(seen[..., None], 1 - cubes, cubes)
    with torch.no_grad():
        plain = model.predict(cubes, draw)
        assert torch.equal(plain, model.predict(hidden_changed, draw))
        assert not torch.allclose(plain, model.predict(seen_changed, draw))


def test_a_place_is_told_by_its_position(tiny: Make) -> None:
    """Two hidden places of one clip are predicted differently, and each the same in any order."""
    model = videomae(tiny)
    cubes = to_cubes(torch.rand(1, 8, 32, 32, 3), model.patch)
    draw = model.draw(keys_of(1))
    with torch.no_grad():
        forward = model.predict(cubes, draw)
        turned = type(draw)(draw.encoded, draw.targets.flip(1))
        backward = model.predict(cubes, turned)
    assert not torch.allclose(forward[:, 0], forward[:, 1])
    torch.testing.assert_close(forward, backward.flip(1), atol=1e-5, rtol=1e-4)
