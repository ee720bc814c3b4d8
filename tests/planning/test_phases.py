"""Phases of a run: their plans, what they cost and take, and refusals with a way out."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arvideo_ds.config import PretrainRecipe, load_recipe
from arvideo_ds.config.load import validate
from arvideo_ds.errors import UserError
from arvideo_ds.optim.schedule import learning_rate
from arvideo_ds.planning.advice import advise
from arvideo_ds.planning.memory import Strategy, footprint
from arvideo_ds.planning.plan import make_plan, phase_lines
from arvideo_ds.planning.text import as_document

SMALL_FIRST = (
    "phases=[{share: 0.8, data.size: 112, train.micro_batch: 64}, {share: 0.2, data.size: 224}]"
)
OTHER_BATCH = (
    "phases=[{share: 0.8, data.size: 16, objective.cluster: [2, 2, 2], train.total_batch: 64},"
    " {share: 0.2}]"
)


def demo(*overrides: str) -> PretrainRecipe:
    return load_recipe("demo", overrides)


def test_a_phase_is_the_recipe_with_its_own_settings_and_the_last_is_the_recipe() -> None:
    recipe = demo(OTHER_BATCH)
    small, last = recipe.by_phase()
    assert (small.clip, small.geometry.cluster, small.train.total_batch) == (
        (8, 16, 16),
        (2,) * 3,
        64,
    )
    assert last.model_dump() == recipe.model_dump(exclude={"phases"})
    assert small.encoder.pretrained_grid == recipe.geometry.grid


@pytest.mark.parametrize(
    "written",
    [
        {"share": 0.5, "data.size": 16, "objective.cluster": [2, 2, 2]},
        {"share": 0.5, "data": {"size": [16, 16]}, "objective": {"cluster": [2, 2, 2]}},
    ],
)
def test_keys_of_a_phase_are_dotted_or_nested_and_survive_the_file(written: Any) -> None:
    tree = {**demo().model_dump(mode="json"), "phases": [written, {"share": 0.5}]}
    recipe = validate(tree, "test")
    assert recipe.by_phase()[0].clip == (8, 16, 16)
    again = validate(recipe.model_dump(mode="json"), "test")
    assert again == recipe
    assert "phases" not in demo().model_dump()


def test_a_phase_is_overridden_by_its_number() -> None:
    recipe = load_recipe("demo_phases", ["phases.0.data.size=24"])
    assert recipe.by_phase()[0].clip == (8, 24, 24)


def test_fps_of_a_phase_replaces_the_stride() -> None:
    data = demo("phases=[{share: 0.5, data.fps: 4}, {share: 0.5}]").by_phase()[0].data
    assert (data.fps, data.stride) == (4, None)


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ("[{share: 0.5}]", "two or more"),
        ("[{share: 0.5}, {share: 0.4}]", "add up to 0.9"),
        ("[{share: 0.5, data.crop: grid}, {share: 0.5}]", "unknown key 'phases.0.data.crop'"),
        ("[{share: 0.5, data.repeats: 4}, {share: 0.5}]", "unknown key 'phases.0.data.repeats'"),
        ("[{share: 0.5, model.patch: [2, 4, 4]}, {share: 0.5}]", "unknown key 'phases.0.model'"),
        ("[{share: 0.5, data.size: 20}, {share: 0.5}]", r"phases\.0: .*does not divide"),
        ("[{share: 0.5, objective.name: videomae}, {share: 0.5}]", r"phases\.0: objective\.name"),
        ("[{share: 0.5, objective.size: 2}, {share: 0.5}]", r"phases\.0: .*size"),
        ("[{share: 0.5, train.total_batch: 9}, {share: 0.5}]", r"phases\.0: .*multiple of"),
        ("[{share: 0.5}, {share: 0.5, data.frames: 4}]", r"last of phases .*data\.frames=4"),
    ],
)
def test_a_wrong_phase_is_refused_with_its_place(phases: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        demo(f"phases={phases}")


def test_scores_and_strides_of_sources_exclude_clips_of_other_phases() -> None:
    with pytest.raises(UserError, match=r"phases\.0: data\.scores"):
        load_recipe(
            "lvmae_events",
            ["data.scores=S", "phases=[{share: 0.5, data.frames: 32}, {share: 0.5}]"],
        )
    sources = "data.sources=[{shards: A, weight: 1}, {shards: B, weight: 1}]"
    phases = "phases=[{share: 0.5, data.stride: 2}, {share: 0.5}]"
    with pytest.raises(UserError, match=r"phases\.0: data\.sources"):
        demo("data.shards=null", sources, phases)


def test_a_phase_without_a_step_is_refused() -> None:
    recipe = demo("phases=[{share: 0.999}, {share: 0.001}]", "train.max_steps=100")
    with pytest.raises(UserError, match=r"phases\.1 has no step"):
        make_plan(recipe, world_size=1)


@given(
    steps=st.integers(20, 4000),
    parts=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    videos=st.lists(st.integers(1, 40), min_size=3, max_size=3),
)
@settings(max_examples=30)
def test_phases_divide_the_steps_and_continue_the_order_without_gap_or_overlap(
    steps: int, parts: list[int], videos: list[int]
) -> None:
    phases = [{"share": n / sum(parts)} for n in parts]
    for phase, count in zip(phases[:-1], videos, strict=False):
        phase["train.total_batch"] = 2 * count
    tree = {**demo().model_dump(mode="json"), "phases": phases}
    tree["train"]["max_steps"] = steps
    plan = make_plan(validate(tree, "test"), world_size=1)
    assert plan.phases[-1].end_step == plan.steps == steps
    position = 0
    for step in range(steps):
        assert plan.videos_before(step) == position
        position += plan.part_at(step).plan.videos_per_step
    assert plan.videos_before(steps) == position
    assert plan.epochs == pytest.approx(position / plan.num_videos, abs=1e-3)
    for part, share in zip(plan.phases, parts, strict=True):
        length = part.end_step - part.first_step
        assert abs(length - steps * share / sum(parts)) <= 1


def test_epochs_are_of_videos_whatever_the_batches_of_the_phases() -> None:
    recipe = demo(OTHER_BATCH, "train.max_steps=null", "train.epochs=10")
    plan = make_plan(recipe, world_size=1)
    assert plan.epochs == pytest.approx(10, rel=0.01)
    assert (
        plan.steps < make_plan(demo("train.max_steps=null", "train.epochs=10"), world_size=1).steps
    )


def test_the_schedule_is_that_of_the_run_scaled_by_the_videos_of_the_phase() -> None:
    plain, plan = (make_plan(demo(*more), world_size=1) for more in ((), (OTHER_BATCH,)))
    for step in (0, 30, 500, 1599, 1600, 1999):
        scale = 2 if step < 1600 else 1
        rate = learning_rate(plan.part_at(step).plan, step)
        assert rate == pytest.approx(scale * learning_rate(plain, step))


def test_without_phases_the_plan_is_one_part_and_has_no_new_key() -> None:
    plan = make_plan(demo(), world_size=1)
    assert [(part.first_step, part.end_step, part.plan) for part in plan.parts] == [(0, 2000, plan)]
    assert plan.videos_before(77) == 77 * plan.videos_per_step
    assert "phases" not in plan.as_dict()
    assert phase_lines(plan) == []


def advice_of(phases: str, memory_gib: float = 80) -> Any:
    recipe = load_recipe("pretrain_vit_b_k400", [phases] if phases else [])
    return advise(
        "test", "zero2.json", recipe, make_plan(recipe, world_size=8), Strategy(stage=2),
        num_gpus=8, memory_gib=memory_gib, tflops=100, tflops_from="", bandwidth_gb_s=100,
    )  # fmt: skip


def test_hours_are_the_sum_of_the_phases_and_the_peak_is_that_of_the_largest() -> None:
    advice, plain = advice_of(SMALL_FIRST), advice_of("")
    document, without = as_document(advice), as_document(plain)
    phases = document["phases"]
    assert phases["train_s"] == pytest.approx(sum(p["s"] for p in phases["options"]))
    assert phases["train_s"] == document["recommended"]["train_s"]
    assert phases["train_s_without"] == pytest.approx(without["recommended"]["train_s"], rel=1e-3)
    small, large = (p["option"]["compute_s"] for p in phases["options"])
    assert small < large / 3  # a quarter of the tokens
    assert phases["train_s"] < 0.6 * phases["train_s_without"]
    assert "phases" not in without
    here = next(scale for scale in document["scaling"] if scale["num_gpus"] == 8)
    assert here["option"]["train_s"] == phases["train_s"]
    peaks = [
        footprint(phase, Strategy(stage=2), 8, part.plan.micro_batch, part.plan.accumulation).peak
        for part, phase in zip(advice.plan.parts, advice.recipe.by_phase(), strict=True)
    ]
    assert advice.given.footprint.peak == max(peaks)


def test_the_data_must_deliver_what_the_fastest_phase_takes() -> None:
    phased, plain = advice_of(SMALL_FIRST).supply, advice_of("").supply
    assert phased.clips_per_s > 2 * plain.clips_per_s
