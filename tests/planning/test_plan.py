"""The run plan: the paper's token counts, exact batch arithmetic, and refusals with a way out."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arvideo_ds.config import FinetuneRecipe, PretrainRecipe, load_recipe
from arvideo_ds.config.load import validate
from arvideo_ds.errors import UserError
from arvideo_ds.planning.plan import RunPlan, make_plan

VIT_B = "pretrain_vit_b_k400"
Tiny = Callable[..., PretrainRecipe]


@functools.cache
def tree_of(name: str) -> dict[str, Any]:
    return load_recipe(name).model_dump()


def batch_plan(
    *, total: int, micro: int, world: int, repeats: int = 1, streams: int | None = None
) -> RunPlan:
    tree = tree_of(VIT_B)
    tree = {
        **tree,
        "train": {**tree["train"], "total_batch": total, "micro_batch": micro},
        "data": {**tree["data"], "repeats": repeats, "num_streams": streams or world},
    }
    return make_plan(validate(tree, "test recipe"), world_size=world)


def plan_of(*overrides: str, world: int = 8, num_videos: int | None = None) -> RunPlan:
    return make_plan(load_recipe(VIT_B, overrides), world_size=world, num_videos=num_videos)


def test_vit_b_has_the_papers_token_counts_and_size() -> None:
    plan = plan_of()
    assert (plan.encoder_tokens, plan.decoder_queries) == (300, 1470)
    assert (plan.num_tokens, plan.num_clusters, plan.cluster_size) == (1568, 16, 98)
    assert 86e6 <= plan.parameters_encoder <= 88e6


def test_the_papers_targets_are_one_cluster_fewer() -> None:
    plan = plan_of("objective.targets=paper")
    assert (plan.encoder_tokens, plan.decoder_queries) == (300, 1372)
    recipe = load_recipe(f"{VIT_B}_paper")
    assert (recipe.counts.encoded, recipe.counts.predicted) == (300, 1372)


# Counted with PyTorch's FLOP counter on another implementation of docs/method.md.
@pytest.mark.parametrize(("ratio", "gflops"), [(1, 93), (0.5, 75), (0.25, 66)])
def test_forward_cost_of_vit_b_is_the_counted_one(ratio: float, gflops: float) -> None:
    plan = plan_of(f"decoder.target_ratio={ratio}")
    assert plan.gflops_forward_per_clip == pytest.approx(gflops, rel=0.03)


@settings(deadline=None, max_examples=60)
@given(
    world=st.integers(1, 96),
    videos=st.integers(1, 40),
    repeats=st.integers(1, 4),
    spare=st.integers(0, 60),
)
def test_accumulation_times_micro_batch_times_ranks_is_the_total_batch(
    world: int, videos: int, repeats: int, spare: int
) -> None:
    per_rank, limit = videos * repeats, repeats + spare
    total = world * per_rank
    plan = batch_plan(total=total, micro=limit, world=world, repeats=repeats)
    assert plan.accumulation * plan.micro_batch * world == plan.total_batch == total
    assert plan.micro_batch <= limit
    assert plan.micro_batch % repeats == 0
    assert plan.videos_per_step * repeats == total
    better = range(plan.micro_batch + repeats, min(limit, per_rank) + 1, repeats)
    assert not [m for m in better if per_rank % m == 0]


@settings(deadline=None, max_examples=60)
@given(world=st.integers(1, 96), videos=st.integers(1, 300), repeats=st.integers(1, 4))
def test_a_batch_that_cannot_be_dealt_is_refused_with_batches_that_can(
    world: int, videos: int, repeats: int
) -> None:
    arguments = {"micro": 8, "world": world, "repeats": repeats}
    total = videos * repeats
    if total % (world * repeats) == 0:
        batch_plan(total=total, **arguments)
        return
    with pytest.raises(UserError, match=f"train.total_batch={total} ") as raised:
        batch_plan(total=total, **arguments)
    offered = [int(n) for n in re.findall(r"\d+", str(raised.value).split("Use ")[1])]
    assert offered
    for other in offered:
        assert batch_plan(total=other, **arguments).total_batch == other


@pytest.mark.parametrize(("world", "streams"), [(5, 48), (7, 960), (96, 36), (64, 1)])
def test_streams_that_cannot_be_dealt_are_refused_with_a_number_that_can(
    world: int, streams: int
) -> None:
    with pytest.raises(UserError, match=f"{world} ranks") as raised:
        batch_plan(total=world, micro=1, world=world, streams=streams)
    assert f"data.num_streams={streams} " in str(raised.value)
    offered = int(re.findall(r"data\.num_streams=(\d+)", str(raised.value))[-1])
    batch_plan(total=world, micro=1, world=world, streams=offered)


def test_a_micro_batch_that_splits_a_videos_clips_is_refused() -> None:
    with pytest.raises(UserError, match=r"micro_batch=2 .*repeats=4"):
        batch_plan(total=64, micro=2, world=1, repeats=4)


def test_ranks_change_the_accumulation_and_nothing_of_the_mathematics() -> None:
    plans = [plan_of(world=world) for world in (1, 2, 8, 64)]
    deal = ("world_size", "micro_batch", "accumulation")
    rest = [{k: v for k, v in plan.as_dict().items() if k not in deal} for plan in plans]
    assert all(other == rest[0] for other in rest)
    assert plans[0].accumulation > plans[-1].accumulation


def test_ranks_that_share_tokens_are_dealt_the_clips_of_one() -> None:
    recipe = load_recipe(VIT_B)
    shared = make_plan(recipe, world_size=16, sequence_parallel=4)
    alone = make_plan(recipe, world_size=4)
    differ = {k for k, v in shared.as_dict().items() if v != alone.as_dict()[k]}
    assert differ == {"world_size", "sequence_parallel"}
    assert shared.data_ranks == 4
    assert [shared.data_rank(rank) for rank in range(16)] == sorted(list(range(4)) * 4)


@pytest.mark.parametrize(
    ("world", "size", "said"),
    [
        (1, 2, r"1 rank\(s\) cannot form whole groups of sequence_parallel_size=2 "),
        (6, 4, r"6 rank\(s\) .*multiple of 4 ranks"),
        (8, 8, r"model.size=B has 12. Use one of 1, 2, 3, 4, 6, 12"),
        (14, 2, r"7 groups of 2 ranks cannot share data.num_streams"),
    ],
)
def test_ranks_that_cannot_share_tokens_are_refused(world: int, size: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make_plan(load_recipe(VIT_B), world_size=world, sequence_parallel=size)


# At 256 videos per step; source: VideoMAE's scripts/{kinetics,ssv2}/*/finetune.sh.
OFFICIAL_PEAKS = {
    "finetune_vit_s_k400": 5e-4,
    "finetune_vit_b_k400": 5e-4,
    "finetune_vit_l_k400": 2e-3,
    "finetune_vit_h_k400": 1e-3,
    "finetune_vit_s_ssv2": 1e-3,
    "finetune_vit_b_ssv2": 5e-4,
}


@pytest.mark.parametrize("name", OFFICIAL_PEAKS)
def test_the_second_clip_of_a_video_does_not_double_the_rate_of_fine_tuning(name: str) -> None:
    recipe = load_recipe(name, ["train.total_batch=512"], FinetuneRecipe)
    assert recipe.data.repeats == 2
    assert make_plan(recipe, world_size=8).lr == pytest.approx(OFFICIAL_PEAKS[name])


RATES = ("lr", "warmup_lr", "min_lr")


@pytest.mark.parametrize("repeats", [1, 2, 4])
@pytest.mark.parametrize("videos", [64, 256, 1024])
def test_every_rate_of_the_schedule_grows_with_the_videos_of_a_step(
    videos: int, repeats: int
) -> None:
    """run_mae_pretraining.py and run_class_finetuning.py scale all three, repeats not counted."""
    keys = ("optim.base_lr=4e-4", "optim.warmup_lr=2e-6", "optim.min_lr=3e-5")
    batch = (f"train.total_batch={videos * repeats}", f"data.repeats={repeats}")
    plan = plan_of(*keys, *batch)
    scale = videos / 256
    assert plan.videos_per_step == videos
    rates = [getattr(plan, name) for name in RATES]
    assert rates == pytest.approx([4e-4 * scale, 2e-6 * scale, 3e-5 * scale])


def test_repeats_of_a_video_change_neither_the_rates_nor_the_epochs() -> None:
    """The same videos a step, each cut into four clips: the same schedule, four times the clips."""
    once, four = plan_of(), plan_of("data.repeats=4", "train.total_batch=4096")
    schedule = (*RATES, "steps", "warmup_steps", "epochs", "videos_per_step")
    assert [getattr(once, key) for key in schedule] == [getattr(four, key) for key in schedule]
    assert four.total_batch == 4 * once.total_batch


def test_an_epoch_of_repeated_videos_takes_more_steps_of_the_same_clips() -> None:
    once, four = plan_of(), plan_of("data.repeats=4")
    assert four.total_batch == once.total_batch == 4 * four.videos_per_step
    assert four.steps == pytest.approx(4 * once.steps, abs=2)
    assert four.warmup_steps == pytest.approx(4 * once.warmup_steps, abs=2)
    assert four.epochs == pytest.approx(once.epochs, abs=0.01)


def test_epochs_become_steps_of_the_videos_that_there_are() -> None:
    plan = plan_of("train.epochs=10", "optim.warmup_epochs=2.5", num_videos=10_240)
    assert (plan.steps, plan.warmup_steps, plan.epochs) == (100, 25, 10)
    assert plan.num_videos_from == "manifest"
    assert plan_of().num_videos_from == "data.num_videos"


def test_a_length_in_steps_is_taken_as_it_is() -> None:
    plan = plan_of("train.epochs=null", "train.max_steps=77", "optim.warmup_steps=5")
    assert (plan.steps, plan.warmup_steps) == (77, 5)


def test_an_unknown_number_of_videos_is_an_error_that_says_how_to_know_it() -> None:
    with pytest.raises(UserError, match="arvideo shards"):
        plan_of("data.num_videos=null")
    assert plan_of("data.num_videos=null", num_videos=5000).num_videos == 5000


VIDEOMAE = {"name": "videomae"}
CONTRADICTIONS: dict[str, tuple[dict[str, dict[str, Any]], tuple[str, ...]]] = {
    "target share and self-attention": (
        {"decoder": {"target_ratio": 0.5, "self_attention": True}},
        ("decoder.target_ratio=0.5", "decoder.self_attention"),
    ),
    "normalised targets of single pixels": (
        {"model": {"patch": [1, 1, 1]}},
        ("objective.normalize_targets", "model.patch"),
    ),
    "one cluster": ({"objective": {"cluster": [4, 8, 8]}}, ("objective.cluster", "1 cluster")),
    "two clusters, the last of them dropped": (
        {"objective": {"cluster": [2, 8, 8], "targets": "paper"}},
        ("objective.cluster", "2 cluster"),
    ),
    "a cell that does not fit": (
        {"objective": {**VIDEOMAE, "decoder_mask": "running_cell"}, "data": {"frames": 4}},
        ("objective.decoder_mask=running_cell", "data.frames"),
    ),
    "nothing hidden": (
        {"objective": {**VIDEOMAE, "mask_ratio": 0.001}},
        ("objective.mask_ratio=0.001", "nothing is left"),
    ),
    "ARVideo's decoder under VideoMAE": (
        {"objective": VIDEOMAE, "decoder": {"target_ratio": 0.5}},
        ("decoder.target_ratio", "running_cell"),
    ),
    "no length": ({"train": {"max_steps": None}}, ("train.epochs", "train.max_steps")),
    "repeats that do not divide the batch": (
        {"data": {"repeats": 3}},
        ("train.total_batch=8", "data.repeats=3"),
    ),
    "heads that do not divide the width": (
        {"decoder": {"width": 96, "heads": 5}},
        ("decoder.width 96", "decoder.heads 5"),
    ),
    "clusters that do not divide the grid": (
        {"objective": {"cluster": [3, 4, 4]}},
        ("objective.cluster", "3"),
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_contradiction_is_refused_with_both_keys(name: str, tiny: Tiny) -> None:
    sections, words = CONTRADICTIONS[name]
    with pytest.raises(UserError) as raised:
        tiny(**sections)
    assert all(word in str(raised.value) for word in words), str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_is_close_to_a_contradiction_passes(tiny: Tiny) -> None:
    assert tiny(decoder={"self_attention": True}).counts.predicted
    assert tiny(objective={"cluster": [2, 8, 8]}).counts.predicted == 128
    pixels = tiny(
        model={"patch": [1, 1, 1]},
        objective={"normalize_targets": False, "cluster": [8, 8, 8]},
    )
    assert pixels.geometry.cube_values == 3
