"""LVMAE: what is chosen, how much of it, and that a full budget is VideoMAE."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from arvideo_ds.config import PretrainRecipe, load_recipe
from arvideo_ds.config.objectives import LvmaeSettings
from arvideo_ds.errors import UserError
from arvideo_ds.long_video.lvmae import LVMAE, latents_of
from arvideo_ds.models.selection import choose, priorities
from arvideo_ds.randomness import draw_key
from arvideo_ds.tasks.pretrain import build_objective

Make = Callable[..., PretrainRecipe]
GRID = (16, 4, 4)
TOKENS = 256
PIXELS = {"targets": "pixels", "decoder_mask": "random"}


def keys_of(count: int, first: int = 0) -> Tensor:
    return torch.tensor([draw_key(0, 0, first + i, 0) for i in range(count)])


def lvmae(tiny: Make, **objective: object) -> LVMAE:
    recipe = tiny(
        objective={"name": "lvmae", "mask_ratio": 0.75, **objective},
        data={"frames": 32, "size": 16},
        model={"patch": [2, 4, 4]},
    )
    torch.manual_seed(0)
    return build_objective(recipe)


def scores_of(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, TOKENS, generator=torch.Generator().manual_seed(seed))


def flags(tokens: Tensor) -> Tensor:
    return torch.zeros(len(tokens), TOKENS, dtype=torch.bool).scatter(1, tokens, value=True)


# ------------------------------------------------------------------------------------- counts


def test_tokens_of_the_published_clip() -> None:
    recipe = load_recipe(
        "videomae_vit_b_k400", ["objective.name=lvmae", "data.frames=128", "data.sampling=dense"]
    )
    counts = recipe.counts
    assert recipe.geometry.num_tokens == 12_544
    assert counts.encoded == 1_280
    assert counts.predicted == 1_881
    assert counts.decoded == 3_161
    assert recipe.target_values == 6


@pytest.mark.parametrize(("budget", "random"), [(0.1, 0.05), (0.0, 0.15), (0.15, 0.0), (1.0, 0.0)])
def test_every_clip_predicts_as_many_hidden_tokens_as_the_recipe_says(
    tiny: Make, budget: float, random: float
) -> None:
    model = lvmae(tiny, budget=budget, random_budget=random)
    draw = model.draw(keys_of(8), scores_of(8))
    assert draw.encoded.shape == (8, model.counts.encoded)
    assert draw.targets.shape == (8, model.counts.predicted)
    seen, wanted = flags(draw.encoded), flags(draw.targets)
    assert not (seen & wanted).any()
    assert (wanted.sum(1) == model.counts.predicted).all()


# ------------------------------------------------------------------------------------- choice


def test_the_most_important_hidden_tokens_are_chosen_and_the_rest_by_chance(tiny: Make) -> None:
    model = lvmae(tiny)
    keys, scores = keys_of(200), scores_of(200)
    draw = model.draw(keys, scores)
    hidden, wanted = ~flags(draw.encoded), flags(draw.targets)
    best = choose(scores, hidden, model.by_rule)
    assert (wanted & best).sum() == best.sum()
    # The others stand anywhere among the hidden tokens that are left.
    left, others = hidden & ~best, wanted & ~best
    share = others.sum() / left.sum()
    low = left & (scores < 0.3)
    assert (others & low).sum() / low.sum() == pytest.approx(share.item(), rel=0.15)


def test_a_draw_depends_on_its_own_key_and_scores_alone(tiny: Make) -> None:
    model, keys, scores = lvmae(tiny), keys_of(4), scores_of(4)
    together = model.draw(keys, scores).targets
    assert torch.equal(together[2:3], model.draw(keys[2:3], scores[2:3]).targets)
    assert not torch.equal(together, model.draw(keys_of(4, first=9), scores).targets)


def test_equal_scores_are_chosen_by_chance_and_not_from_the_start() -> None:
    keys = keys_of(300)
    ranking = priorities("scores", keys, GRID, torch.zeros(300, TOKENS))
    chosen = choose(ranking, torch.ones(300, TOKENS, dtype=torch.bool), 64)
    assert chosen.float().mean(0).sub(0.25).abs().max() < 0.12


def test_uniform_takes_every_seventh_time_first() -> None:
    chosen = choose(
        priorities("uniform", keys_of(3), GRID), torch.ones(3, TOKENS, dtype=torch.bool), 48
    )
    times = chosen.view(3, *GRID).flatten(2)
    assert times[:, [0, 7, 14]].all() and chosen.sum() == 3 * 48


def test_never_more_than_allowed_and_highest_first() -> None:
    allowed = torch.rand(5, TOKENS, generator=torch.Generator().manual_seed(1)) < 0.5
    scores = scores_of(5, seed=2)
    chosen = choose(scores, allowed, 40)
    assert not (chosen & ~allowed).any() and (chosen.sum(1) == 40).all()
    for row in range(5):
        assert scores[row][chosen[row]].min() > scores[row][allowed[row] & ~chosen[row]].max()


# ------------------------------------------------------------------------------------- loss


def test_a_full_budget_of_pixels_is_videomae(tiny: Make) -> None:
    full = lvmae(tiny, budget=1.0, **PIXELS)
    twin = build_objective(
        tiny(
            objective={"name": "videomae", "mask_ratio": 0.75},
            data={"frames": 32, "size": 16},
            model={"patch": [2, 4, 4]},
        )
    )
    twin.load_state_dict(full.state_dict())
    clips = torch.randint(256, (2, 32, 16, 16, 3), dtype=torch.uint8)
    assert torch.equal(full(clips, keys_of(2)), twin(clips, keys_of(2)))


def test_latents_are_predicted_of_the_chosen_tokens_alone(tiny: Make) -> None:
    model = lvmae(tiny)
    clips = torch.randint(256, (2, 32, 16, 16, 3), dtype=torch.uint8)
    codes = torch.randint(8**6, (2, TOKENS))
    keys, scores = keys_of(2), scores_of(2)
    loss = model(clips, keys, scores, codes)
    draw = model.draw(keys, scores)
    changed = torch.where(flags(draw.targets), codes, 0)
    assert torch.equal(loss, model(clips, keys, scores, changed))
    changed[:, draw.targets[0, 0]] += 1
    assert not torch.equal(loss[0], model(clips, keys, scores, changed)[0])


def test_latents_equal_those_of_the_library() -> None:
    library = pytest.importorskip("vector_quantize_pytorch")
    for levels in ([8] * 6, [8, 6, 5], [3, 4]):
        latents, codes = library.FSQ(levels)(torch.randn(2, 50, len(levels)))
        assert torch.allclose(latents_of(codes.long(), levels), latents.float())


# ------------------------------------------------------------------------------------- ARVideo


@pytest.mark.parametrize("rule", ["scores", "uniform", "running_cell"])
def test_arvideo_takes_the_first_tokens_of_each_cluster_by_the_same_rules(
    tiny: Make, rule: str
) -> None:
    recipe = tiny(
        data={"frames": 32, "size": 16},
        model={"patch": [2, 4, 4]},
        objective={"cluster": [4, 2, 2]},
        decoder={"target_ratio": 0.25, "target_rule": rule},
    )
    model, keys, scores = build_objective(recipe), keys_of(6), scores_of(6)
    draw = model.draw(keys, scores)
    ranking = priorities(rule, keys, GRID, scores)  # type: ignore[arg-type]
    for clip in range(6):
        for step, targets in enumerate(draw.targets[clip].view(model.num_predicted, -1)):
            cluster = model.clusters[draw.order[clip, 1 + step]]
            assert set(targets.tolist()) <= set(cluster.tolist())
            others = [t for t in cluster.tolist() if t not in targets.tolist()]
            assert ranking[clip, targets].min() > ranking[clip, others].max()


# ------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("objective", "says"),
    [
        ({"budget": 0.0, "random_budget": 0.0}, "objective.budget"),
        ({"latent_levels": []}, "objective.latent_levels"),
        ({"budget": 1.5}, "objective.budget"),
        ({"decoder_mask": "best"}, "decoder_mask"),
    ],
)
def test_settings_that_choose_nothing_are_refused(
    tiny: Make, objective: dict[str, object], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        tiny(objective={"name": "lvmae", **objective}, data={"frames": 32})


def test_a_rule_of_targets_wants_targets_to_be_left_out(tiny: Make) -> None:
    with pytest.raises(UserError, match="target_ratio"):
        tiny(decoder={"target_rule": "scores", "target_ratio": 1.0})


def test_what_needs_scores(tiny: Make) -> None:
    def needs(**settings: object) -> bool:
        return LvmaeSettings(name="lvmae", **settings).needs_scores(tiny().decoder)

    assert needs() and needs(decoder_mask="random") and needs(targets="pixels")
    assert not needs(targets="pixels", decoder_mask="uniform")
