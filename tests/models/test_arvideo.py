"""ARVideo: what may depend on what, and the numbers that follow from the recipe."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from arvideo_ds.config import PretrainRecipe
from arvideo_ds.errors import UserError
from arvideo_ds.models.arvideo import OrderedDraw
from arvideo_ds.models.cubes import pick, pixel_targets, to_cubes
from arvideo_ds.models.draws import random_subsets
from arvideo_ds.models.encoder import encode_clips
from arvideo_ds.models.order import attention_bias, may_see_before, step_numbers
from arvideo_ds.planning.plan import make_plan
from arvideo_ds.randomness import draw_key
from arvideo_ds.tasks.pretrain import build_objective

Make = Callable[..., PretrainRecipe]

# Shape of clip, patch and cluster: cubes, whole frames, tubes, single tokens, a rectangle, pixels.
SHAPES: dict[str, dict[str, dict[str, object]]] = {
    "blocks": {"objective": {"cluster": [2, 4, 4]}},
    "frames": {"objective": {"cluster": [1, 8, 8]}},
    "tubes": {"objective": {"cluster": [4, 2, 2]}},
    "tokens": {"objective": {"cluster": [1, 1, 1]}, "data": {"size": 16}},
    "rectangle": {"objective": {"cluster": [2, 2, 3]}, "data": {"size": [16, 24]}},
    "tokens_dropped_as_clusters": {
        "objective": {"cluster": [1, 1, 1], "drop": "clusters"},
        "data": {"size": 16},
    },
    "pixels": {
        "model": {"patch": [1, 1, 1]},
        "objective": {"cluster": [1, 1, 1], "normalize_targets": False},
        "data": {"frames": 2, "size": 4},
    },
}
ORDERS = ["random", "spatial_first", "temporal_first"]
DECODERS: dict[str, dict[str, object]] = {
    "cross": {},
    "self_and_cross": {"self_attention": True},
    "subsampled": {"target_ratio": 0.5},
}


def clips_of(recipe: PretrainRecipe, count: int) -> torch.Tensor:
    return torch.rand(count, *recipe.geometry.clip, 3)


def keys_of(count: int, step: int = 0) -> torch.Tensor:
    return torch.tensor([draw_key(0, 0, step * count + i, 0) for i in range(count)])


def with_order(sections: dict[str, dict[str, object]], order: str) -> dict[str, dict[str, object]]:
    return {**sections, "objective": {**sections["objective"], "order": order}}


@pytest.mark.parametrize("targets", ["shifted", "paper"])
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_prediction_depends_on_pixels_of_its_own_or_a_later_cluster(
    tiny: Make, shape: str, order: str, decoder: str, targets: str
) -> None:
    sections = with_order(SHAPES[shape], order)
    if order != "random" and sections["objective"].get("drop") == "clusters":
        pytest.skip("refused: it would drop the same clusters of every clip")
    sections["objective"]["targets"] = targets
    recipe = tiny(**sections, decoder=DECODERS[decoder])
    model = build_objective(recipe)
    clip = clips_of(recipe, 1).requires_grad_()
    draw = model.draw(keys_of(1))
    predicted = model.predict(to_cubes(clip, model.patch), draw)
    per_step = predicted.unflatten(1, (model.num_predicted, -1))
    steps = range(model.num_predicted)
    # All steps where there are few, else the ends and one between.
    for step in steps if len(steps) < 8 else (0, len(steps) // 2, len(steps) - 1):
        (gradient,) = torch.autograd.grad(per_step[:, step].sum(), clip, retain_graph=True)
        touched = to_cubes(gradient, model.patch)[0].abs().amax(1) > 0
        own_and_later = model.clusters[draw.order[0, step + 1 :]].flatten()
        before = model.clusters[draw.order[0, : step + 1]].flatten()
        assert not touched[own_and_later].any()
        assert touched[before].any()
        # Dropped tokens are never embedded.
        assert set(touched.nonzero().flatten().tolist()) <= set(draw.encoded[0].tolist())


@pytest.mark.parametrize("objective", [{}, {"cluster": [2, 2, 2], "drop": "clusters"}])
@pytest.mark.parametrize("self_attention", [False, True])
def test_masked_attention_equals_running_each_step_on_its_past_alone(
    tiny: Make, self_attention: bool, objective: dict[str, object]
) -> None:
    recipe = tiny(objective=objective, decoder={"self_attention": self_attention})
    model = build_objective(recipe)
    cubes = to_cubes(clips_of(recipe, 2), model.patch)
    draw = model.draw(keys_of(2))
    whole = model.predict(cubes, draw)
    for step in range(1, model.num_predicted + 1):
        # Only steps 1..step encoded, only queries of steps 2..step+1 asked, nothing else there.
        seen = int((model.encoded_steps <= step).sum()) * model.kept
        asked = step * model.targets
        past = draw.encoded[:, :seen]
        encoded = model.encoder(pick(cubes, past), past, model.encoder_mask[:seen, :seen])
        self_mask = None if model.self_mask is None else model.self_mask[:asked, :asked]
        predicted = model.decoder(
            encoded, draw.targets[:, :asked], model.cross_mask[:asked, :seen], self_mask
        )
        last = slice(asked - model.targets, asked)
        assert torch.allclose(predicted[:, last], whole[:, last], atol=1e-5)


def test_tokens_of_one_cluster_see_each_other(tiny: Make) -> None:
    model = build_objective(tiny())
    first_step = model.encoder_mask[: model.kept, : model.kept]
    assert (first_step == 0).all()


@pytest.mark.parametrize("order", ORDERS)
def test_a_draw_keeps_the_right_number_of_different_tokens_of_each_step(
    tiny: Make, order: str
) -> None:
    model = build_objective(
        tiny(objective={"order": order, "drop_ratio": 0.8}, decoder={"target_ratio": 0.5})
    )
    draw = model.draw(keys_of(5))
    assert model.kept == 6  # floor(0.2 * 32 + 0.5)
    for clip in range(5):
        for step in range(model.num_encoded):
            members = set(model.clusters[draw.order[clip, step]].tolist())
            kept = draw.encoded[clip].view(model.num_encoded, -1)[step].tolist()
            assert len(set(kept)) == model.kept
            assert set(kept) <= members
        for step in range(model.num_predicted):
            members = set(model.clusters[draw.order[clip, step + 1]].tolist())
            wanted = draw.targets[clip].view(model.num_predicted, -1)[step].tolist()
            assert len(set(wanted)) == 16
            assert set(wanted) <= members


@pytest.mark.parametrize(
    ("cluster", "of_tokens", "of_clusters"),
    [([1, 1, 1], 0.0, 0.8), ([2, 1, 1], 0.5, 0.8), ([4, 1, 1], 0.75, 0.8), ([2, 4, 4], 0.81, 0.86)],
)
def test_small_clusters_drop_the_requested_share_as_whole_clusters(
    tiny: Make, cluster: list[int], of_tokens: float, of_clusters: float
) -> None:
    """One token of each cluster stays where tokens are dropped, so small ones drop less."""
    for drop, expected in (("tokens", of_tokens), ("clusters", of_clusters)):
        recipe = tiny(objective={"cluster": cluster, "drop": drop, "drop_ratio": 0.8})
        geometry, encoded = recipe.geometry, recipe.counts.encoded
        share = 1 - encoded / (geometry.num_tokens - geometry.cluster_size)
        assert share == pytest.approx(expected, abs=0.01)
        assert make_plan(recipe, world_size=1).dropped_share == pytest.approx(share, abs=1e-4)
        assert build_objective(recipe).draw(keys_of(2)).encoded.shape == (2, encoded)


def test_dropping_clusters_keeps_the_first_step_whole_and_every_cluster_equally_often(
    tiny: Make,
) -> None:
    recipe = tiny(objective={"cluster": [2, 2, 2], "drop": "clusters", "drop_ratio": 0.75})
    model = build_objective(recipe)
    num_clusters, size = model.clusters.shape
    draw = model.draw(keys_of(2000))
    cluster_of = torch.empty(recipe.geometry.num_tokens, dtype=torch.long)
    cluster_of[model.clusters.flatten()] = torch.arange(num_clusters).repeat_interleave(size)
    seen = cluster_of[draw.encoded].unflatten(1, (model.num_encoded, size))
    assert (seen == seen[..., :1]).all()  # whole clusters
    assert torch.equal(seen[:, 0, 0], draw.order[:, 0])
    counts = torch.bincount(seen[..., 0].flatten(), minlength=num_clusters) / 2000
    # One standard deviation is 0.01.
    assert torch.allclose(counts, torch.tensor(model.num_encoded / num_clusters), atol=0.05)


def test_dropping_clusters_needs_a_random_order(tiny: Make) -> None:
    with pytest.raises(UserError, match=r"objective\.drop=clusters .*spatial_first"):
        tiny(objective={"drop": "clusters", "order": "spatial_first"})


def test_orders_differ_between_clips_and_steps_and_repeat_with_the_key(tiny: Make) -> None:
    model = build_objective(tiny())
    orders = [model.draw(keys_of(8, step)).order for step in range(4)]
    assert len({tuple(order.tolist()) for order in torch.cat(orders)}) > 30
    assert torch.equal(orders[2], model.draw(keys_of(8, 2)).order)


def test_the_loss_is_a_function_of_clip_and_key_alone(tiny: Make) -> None:
    recipe = tiny()
    model = build_objective(recipe)
    clips, keys = clips_of(recipe, 4), keys_of(4)
    together = model(clips, keys)
    torch.manual_seed(1)
    alone = torch.cat([model(clips[i : i + 1], keys[i : i + 1]) for i in range(4)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_target_subsampling_estimates_the_full_loss_without_bias(tiny: Make) -> None:
    torch.manual_seed(0)
    full = build_objective(tiny(objective={"order": "spatial_first", "drop_ratio": 0.0}))
    part = build_objective(
        tiny(
            objective={"order": "spatial_first", "drop_ratio": 0.0}, decoder={"target_ratio": 0.25}
        )
    )
    part.load_state_dict(full.state_dict())
    clip = clips_of(tiny(), 1)
    with torch.no_grad():
        whole = full(clip, keys_of(1))
        draws = torch.cat(
            [part(clip.expand(32, -1, -1, -1, -1), keys_of(32, s)) for s in range(16)]
        )
    error = draws.std() / len(draws) ** 0.5
    assert error > 0
    assert (draws.mean() - whole).abs() < 5 * error


def test_the_paper_convention_predicts_one_step_less(tiny: Make) -> None:
    shifted, paper = (build_objective(tiny(objective={"targets": t})) for t in ("shifted", "paper"))
    keys = keys_of(3)
    assert paper.num_encoded == shifted.num_encoded
    assert paper.num_predicted == shifted.num_predicted - 1
    last = shifted.draw(keys).order[:, -1]
    targets = paper.draw(keys).targets
    assert not (targets[..., None] == paper.clusters[last][:, None]).any()


def test_masks_are_buffers_that_no_checkpoint_holds(tiny: Make) -> None:
    model = build_objective(tiny())
    buffers = dict(model.named_buffers())
    assert {"encoder_mask", "cross_mask", "clusters"} <= set(buffers)
    assert not set(model.state_dict()) & set(buffers)


def test_the_encoder_alone_encodes_whole_clips(tiny: Make) -> None:
    recipe = tiny()
    model = build_objective(recipe)
    tokens = encode_clips(model.encoder, clips_of(recipe, 2), recipe.patch)
    assert tokens.shape == (2, recipe.geometry.num_tokens, recipe.size.width)


def test_half_precision_trains(tiny: Make) -> None:
    recipe = tiny()
    model = build_objective(recipe)
    single = model(clips_of(recipe, 2), keys_of(2))
    half = model.bfloat16()(clips_of(recipe, 2), keys_of(2))
    assert half.dtype == torch.float32
    assert torch.allclose(single, half, rtol=0.2)


@pytest.mark.gpu
def test_the_gpu_computes_the_same_loss(tiny: Make) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    recipe = tiny()
    model = build_objective(recipe)
    clips, keys = clips_of(recipe, 4), keys_of(4)
    there = model.cuda()(clips.cuda(), keys.cuda()).cpu()
    assert torch.allclose(there, model.cpu()(clips, keys), rtol=1e-3)
    assert torch.equal(model.cuda().draw(keys.cuda()).encoded.cpu(), model.cpu().draw(keys).encoded)


def test_the_gradient_on_a_share_of_the_targets_is_an_unbiased_estimate_of_the_whole(
    tiny: Make,
) -> None:
    """Order and kept tokens fixed, targets drawn again: docs/method.md, Loss on a part of them."""
    count, share = 40, 0.25
    recipe = tiny(
        decoder={"target_ratio": share},
        objective={"cluster": [1, 4, 4]},
        data={"frames": 8, "size": 16},
    )
    torch.manual_seed(0)
    model = build_objective(recipe)
    cubes, held = to_cubes(clips_of(recipe, 1), model.patch), model.draw(keys_of(1))
    order = held.order[:, 1 : 1 + model.num_predicted]
    size = model.clusters.shape[1]

    def gradient(members: torch.Tensor) -> torch.Tensor:
        """Of the loss on the given members of every predicted cluster, 1 x steps x n."""
        model.zero_grad()
        targets = model._tokens(order, members)
        repeated = OrderedDraw(encoded=held.encoded, targets=targets, order=held.order)
        num_targets = members.shape[-1]
        queries = step_numbers(torch.arange(2, 2 + model.num_predicted), num_targets)
        seen = step_numbers(model.encoded_steps, model.kept)
        model.cross_mask = attention_bias(may_see_before(queries, seen))
        wanted = pixel_targets(pick(cubes, targets), normalize=True)
        (model.predict(cubes, repeated) - wanted).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    whole = gradient(torch.arange(size).expand(1, model.num_predicted, size))
    picked = model.targets
    assert picked == share * size
    drawn = torch.stack(
        [
            gradient(random_subsets(key[None], 3, model.num_predicted, size, picked))
            for key in keys_of(count)
        ]
    )
    # Squared distance of the mean from the whole, in units of what chance alone leaves: 1 expected.
    chance = drawn.var(0).sum() / count
    assert (drawn.mean(0) - whole).square().sum() / chance < 1.5
    # The same members every time are no such estimate.
    fixed = gradient(torch.arange(picked).expand(1, model.num_predicted, picked))
    assert (fixed - whole).square().sum() / chance > 10


def test_all_layers_share_one_bias_of_the_weights_type_in_padded_rows(
    tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else PyTorch casts and pads it in every layer; cuDNN would misread another type."""
    seen: list[torch.Tensor] = []

    def attend(q: torch.Tensor, *_: object, attn_mask: torch.Tensor, **__: object) -> torch.Tensor:
        seen.append(attn_mask)
        return q

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    recipe = tiny(objective={"drop_ratio": 0.6})
    model = build_objective(recipe)
    for parameter in model.parameters():  # DeepSpeed casts no buffers
        parameter.data = parameter.data.bfloat16()
    model(clips_of(recipe, 2), keys_of(2))
    assert seen[0].shape[1] % 8
    assert {mask.dtype for mask in seen} == {torch.bfloat16}
    assert all(mask.stride(0) % 8 == 0 and mask.stride(1) == 1 for mask in seen)
    assert len({mask.data_ptr() for mask in seen}) == 2
