"""The tokenizer: shapes, cost, what decides what, and loading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from arvideo_ds.config import FinetuneRecipe, TokenizerRecipe, load_recipe
from arvideo_ds.config.load import validate
from arvideo_ds.config.tokenizer import halvings
from arvideo_ds.errors import UserError
from arvideo_ds.evaluation.pretrained import load_trained_encoder
from arvideo_ds.long_video.importance import Float32Conv3d
from arvideo_ds.long_video.scorers import Piece, make_scorer
from arvideo_ds.long_video.tokenizer import Tokenizer, load_tokenizer
from arvideo_ds.planning.cost import cost_of
from arvideo_ds.tasks.transfer import settle_transfer
from tests.conftest import count_parameters

Make = Callable[..., TokenizerRecipe]


@pytest.fixture
def make() -> Make:
    def recipe(patch: tuple[int, ...] = (2, 4, 4), **tokenizer: Any) -> TokenizerRecipe:
        settings = {
            "filters": 4,
            "multipliers": [1, 2, 2],
            "blocks": 1,
            "levels": [8, 5, 5],
            "samples": 8,
        }
        tree = {
            "task": "tokenizer",
            "model": {"patch": list(patch)},
            "tokenizer": {**settings, **tokenizer},
            "data": {"frames": 8, "size": 16, "num_videos": 48, "num_streams": 12},
            "train": {"max_steps": 2, "total_batch": 4, "micro_batch": 4, "precision": "fp32"},
        }
        return validate(tree, "test recipe", TokenizerRecipe)

    return recipe


def build(recipe: TokenizerRecipe) -> Tokenizer:
    torch.manual_seed(0)
    return Tokenizer(recipe.patch, recipe.tokenizer)


def clips_of(recipe: TokenizerRecipe, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (count, *recipe.geometry.clip, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(
    ("patch", "multipliers"),
    [
        ((2, 4, 4), [1, 2, 2]),
        ((2, 8, 8), [1, 1, 2, 2]),
        ((4, 2, 1), [1, 2, 2]),
        ((1, 2, 4), [2, 1, 1]),
    ],
)
def test_latents_stand_on_the_token_grid_and_cost_what_the_plan_says(
    patch: tuple[int, int, int], multipliers: list[int], make: Make
) -> None:
    recipe = make(patch, multipliers=multipliers, blocks=2, keep_share=0.7)
    model, clips = build(recipe), clips_of(recipe)
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        made = model(clips, torch.tensor([1, 2]))
    grid = recipe.geometry.grid
    assert made.pixels.shape == clips.shape
    assert made.codes.shape == made.kept.shape == (2, *grid)
    scores, codes = model.tokens(clips)
    assert scores.shape == (2, *grid) and scores.dtype == torch.float32
    assert codes.dtype == torch.int64 and torch.equal(codes, made.codes)
    assert torch.equal(scores[:, 0], scores[:, 1])
    assert codes.min() >= 0 and codes.max() < recipe.tokenizer.num_codes
    cost = cost_of(recipe)
    assert counted.get_total_flops() == 2 * cost.flops_forward_per_clip
    decoder = count_parameters(model.decoder)
    assert decoder == cost.parameters_decoder
    assert count_parameters(model) - decoder == cost.parameters_encoder


def test_the_published_tokenizer_has_1568_tokens_of_18_bits_and_keeps_768() -> None:
    recipe = load_recipe("tokenizer_b_k600", (), TokenizerRecipe)
    assert recipe.geometry.grid == (8, 14, 14)
    assert recipe.tokenizer.num_codes == 2**18
    assert recipe.tokenizer.kept(recipe.geometry) == 768
    assert halvings(recipe.patch) == [(2, 2, 2), (1, 2, 2), (1, 2, 2), (1, 2, 2)]
    # A longer or shorter clip keeps the same share.
    assert (
        load_recipe("tokenizer_b_k600", ["data.frames=32"], TokenizerRecipe).tokenizer.kept(
            recipe.geometry
        )
        == 768
    )


def test_k_are_kept_exactly_and_the_first_time_always(make: Make) -> None:
    recipe = make()
    model, clips = build(recipe), clips_of(recipe, 3)
    k = recipe.tokenizer.kept(recipe.geometry)
    hard, soft = model(clips).kept, model(clips, torch.tensor([1, 2, 3])).kept
    assert hard.flatten(1).sum(1).tolist() == [k] * 3
    assert hard.unique().tolist() == [0, 1]
    torch.testing.assert_close(soft.flatten(1).sum(1), torch.full((3,), float(k)))
    assert bool((hard[:, 0] == 1).all() and (soft[:, 0] == 1).all())
    # The best of the later ones, and no others.
    scores, _ = model.tokens(clips)
    for kept, score in zip(hard[:, 1:].flatten(1).bool(), scores[:, 1:].flatten(1), strict=True):
        assert score[kept].min() >= score[~kept].max()


def test_what_is_not_kept_does_not_reach_the_decoder(make: Make) -> None:
    recipe = make()
    model, clips = build(recipe).eval(), clips_of(recipe, 1)
    given: list[torch.Tensor] = []
    model.decoder.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    kept = model(clips).kept[0].bool()
    assert not given[0][0][:, ~kept].any()
    assert given[0][0][:, kept].any()


def test_the_scorer_learns_through_the_choice_alone(make: Make) -> None:
    recipe = make(sigma=0.5, samples=64)
    model, clips = build(recipe), clips_of(recipe)
    made = model(clips, torch.tensor([1, 2]))
    made.pixels.square().mean().backward()
    slopes = [p.grad for p in model.scorer.parameters()]
    assert all(slope is not None and slope.isfinite().all() for slope in slopes)
    assert any(slope.abs().max() > 0 for slope in slopes)
    assert all(p.grad is not None for p in model.parameters())


def test_importance_is_change_and_a_still_clip_is_no_accident(make: Make) -> None:
    recipe = make()
    model = build(recipe)
    clip = clips_of(recipe, 1)[:, :1].expand(1, 8, 16, 16, 3).clone()
    still, _ = model.tokens(clip)
    clip[:, 4:, :8, :8] = 255 - clip[:, 4:, :8, :8]
    moved, _ = model.tokens(clip)
    assert bool((moved[0, 2, :2, :2] > 100 * still[0, 2, :2, :2]).all())
    # Far from the change nothing happens; half a token beside it counts.
    torch.testing.assert_close(moved[0, :, 3, 3], still[0, :, 3, 3])
    clip = clip[:, :1].expand(1, 8, 16, 16, 3)
    model(clip, torch.tensor([1])).pixels.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_nothing_matters_in_a_clip_that_stands_still(make: Make) -> None:
    model = build(make())
    picture = clips_of(make())[:, :1]
    scores, _ = model.tokens(picture.expand_as(clips_of(make())))
    # No edge in time or space counts as a change.
    assert scores.max() < 1e-5


def test_choices_are_made_in_float32_and_not_in_tf32(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    convolve, allowed = Float32Conv3d._conv_forward, []

    def looked_at(self: Float32Conv3d, *given: Any) -> torch.Tensor:
        allowed.append(torch.backends.cudnn.allow_tf32)
        return convolve(self, *given)

    monkeypatch.setattr(Float32Conv3d, "_conv_forward", looked_at)
    assert torch.backends.cudnn.allow_tf32  # as torch has it
    build(make()).tokens(clips_of(make()))
    assert allowed == [False] * 3  # the scorer's two, the encoder's last
    assert torch.backends.cudnn.allow_tf32 and torch.backends.cudnn.enabled


@pytest.mark.gpu
def test_on_a_gpu_scores_and_latents_are_float32(make: Make) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    torch.manual_seed(0)
    convolution, x = Float32Conv3d(64, 64, 3, padding=1), torch.randn(2, 64, 8, 28, 28)
    exact = (
        convolution.double()
        ._conv_forward(x.double(), convolution.weight, convolution.bias)
        .detach()
    )
    off = convolution.float().cuda()(x.cuda()).double().cpu() - exact
    # TF32 is off by some 3e-4 of it.
    assert off.norm() < 1e-5 * exact.norm()
    recipe = make()
    model, clips = build(recipe), clips_of(recipe)
    wanted, _ = model.tokens(clips)
    scores, codes = model.cuda().tokens(clips.cuda())
    torch.testing.assert_close(scores.cpu(), wanted, rtol=1e-4, atol=1e-5)
    assert codes.min() >= 0 and codes.max() < recipe.tokenizer.num_codes


@pytest.mark.gpu
def test_a_gpu_scores_videos_as_a_cpu_does(make: Make, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    recipe, run = make(), tmp_path / "run"
    saved(run, recipe, "model.safetensors")
    piece = Piece("v", 0, clips_of(recipe, 4).numpy().reshape(2, 16, 16, 16, 3))
    here, there = (
        make_scorer("tokenizer", recipe.patch, tokenizer=str(run), device=device)
        for device in ("cpu", "cuda")
    )
    assert there.on_device and here.tokenizer == there.tokenizer
    one, other = here(piece), there(piece)
    assert one.codes is not None and other.codes is not None
    assert np.abs(one.scores - other.scores).max() < 1e-4
    # Latents near the edge of two levels may fall to the other side.
    assert (one.codes == other.codes).mean() > 0.95


def test_half_precision_changes_neither_scores_nor_how_latents_are_rounded(make: Make) -> None:
    recipe = make()
    model, clips = build(recipe), clips_of(recipe)
    half = build(recipe).bfloat16()
    for part in (model.scorer, half.scorer):
        for parameter in part.parameters():  # the same weights, in two formats
            parameter.data = parameter.data.bfloat16().to(parameter.dtype)
    assert torch.equal(model.tokens(clips)[0], half.tokens(clips)[0])
    made = half(clips, torch.tensor([1, 2]))
    assert made.pixels.dtype == made.kept.dtype == torch.float32
    values = half.quantizer.indices_to_codes(made.codes.flatten())
    assert values.abs().max() <= 1


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"adversarial_weight": 0.1}, "no adversarial loss"),
        ({"perceptual_weight": 0.1}, "tokenizer.perceptual_network=FILE"),
        ({"multipliers": [1, 2]}, "needs 3, one per resolution"),
        ({"keep_share": 0.2}, "more than the 16 of the first time"),
        ({"keep_share": 1.0}, "drop some"),
        ({"levels": [64, 64, 64, 64, 64]}, "1073741824 codes"),
        ({"patch": (8, 4, 4), "multipliers": [1, 1, 1, 1]}, "Raise data.frames"),
        ({"filter": 4}, "did you mean 'tokenizer.filters'"),
    ],
)
def test_contradictions_are_said_with_their_key(
    overrides: dict[str, Any], said: str, make: Make
) -> None:
    with pytest.raises(UserError, match=said.replace(".", r"\.")):
        make(**overrides)


def test_a_tokenizer_has_powers_of_two_for_its_patch_and_no_size() -> None:
    with pytest.raises(UserError, match="power of two, but its frames are 3"):
        load_recipe("tokenizer_demo", ["data.frames=12", "model.patch=[3,4,4]"], TokenizerRecipe)
    with pytest.raises(UserError, match=r"unknown key 'model\.size'"):
        load_recipe("tokenizer_demo", ["model.size=B"], TokenizerRecipe)
    with pytest.raises(UserError, match=r"train a tokenizer; start it with `arvideo tokenizer"):
        load_recipe("tokenizer_demo")


def test_a_tokenizer_is_no_encoder_to_begin_with(make: Make, tmp_path: Path) -> None:
    run = tmp_path / "run"
    saved(run, make(), "model.safetensors")
    recipe = load_recipe("finetune_demo", [f"finetune.init_from={run}"], FinetuneRecipe)
    with pytest.raises(UserError, match="is a run of the tokenizer"):
        settle_transfer(recipe, tmp_path)
    with pytest.raises(UserError, match="only the encoder transfers"):
        load_trained_encoder(recipe, run)


def saved(folder: Path, recipe: TokenizerRecipe, *names: str) -> list[Tokenizer]:
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    models = []
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        models.append(Tokenizer(recipe.patch, recipe.tokenizer).eval())
        save_file(models[-1].state_dict(), folder / name)
    return models


def test_a_run_is_loaded_by_its_average_or_by_the_file_that_is_named(
    make: Make, tmp_path: Path
) -> None:
    recipe = make()
    clips, run = clips_of(recipe), tmp_path / "run"
    last, average = saved(run, recipe, "model.safetensors", "ema.safetensors")
    for path, wanted in ((run, average), (run / "model.safetensors", last)):
        loaded = load_tokenizer(path)
        assert not loaded.training
        for a, b in zip(loaded.tokens(clips), wanted.tokens(clips), strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(last.tokens(clips)[0], average.tokens(clips)[0])


def test_what_is_no_tokenizer_is_refused_with_the_reason(make: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no"):
        load_tokenizer(tmp_path / "nowhere")
    run = tmp_path / "run"
    saved(run, make(), "model.safetensors")
    (run / "recipe.yaml").write_text("task: pretrain\n")
    with pytest.raises(
        UserError, match=r"expected a run of the tokenizer, but .* is a pretraining run"
    ):
        load_tokenizer(run)
    other = make(filters=8).model_dump(mode="json")
    (run / "recipe.yaml").write_text(yaml.safe_dump(other))
    with pytest.raises(UserError, match="does not fit"):
        load_tokenizer(run)
    (run / "model.safetensors").unlink()
    with pytest.raises(UserError, match="not finished"):
        load_tokenizer(run)
