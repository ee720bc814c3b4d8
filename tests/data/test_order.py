"""The order of samples: a permutation per epoch, the same for any number of ranks, O(shards)."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import pickle
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arvideo_ds.config import PretrainRecipe
from arvideo_ds.config.load import validate
from arvideo_ds.data.order import SampleOrder, rank_positions
from arvideo_ds.errors import UserError
from arvideo_ds.planning.plan import RunPlan, make_plan

SIZES = st.lists(st.integers(0, 20), min_size=1, max_size=12).filter(any)
WORLDS = (1, 2, 3, 4, 6, 8, 12)


def samples(order: SampleOrder, start: int, stop: int) -> list[tuple[int, int]]:
    places = [order.place(position) for position in range(start, stop)]
    return [(place.shard, place.member) for place in places]


@given(
    sizes=SIZES,
    num_streams=st.integers(1, 60),
    window_shards=st.integers(1, 5),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 1000),
)
@settings(deadline=None)
def test_every_position_of_an_epoch_is_a_different_sample(
    sizes: list[int], num_streams: int, window_shards: int, seed: int, epoch: int
) -> None:
    order = SampleOrder(sizes, seed=seed, num_streams=num_streams, window_shards=window_shards)
    n = sum(sizes)
    everything = {(shard, member) for shard, size in enumerate(sizes) for member in range(size)}
    for start in (epoch * n, (epoch + 1) * n):
        assert set(samples(order, start, start + n)) == everything
    places = [order.place(position) for position in range(epoch * n, (epoch + 2) * n)]
    named = [divmod(position, n) for position in range(epoch * n, (epoch + 2) * n)]
    assert [(place.epoch, place.position) for place in places] == named


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [
        samples(
            SampleOrder([10] * 20, seed=seed, num_streams=4, window_shards=2),
            epoch * 200,
            (epoch + 1) * 200,
        )
        for seed in range(3)
        for epoch in range(3)
    ]
    for first, second in itertools.combinations(orders, 2):
        agreeing = sum(a == b for a, b in zip(first, second, strict=True))
        assert agreeing < 30  # one of 200 is expected


def test_a_place_depends_on_no_earlier_call() -> None:
    def order() -> SampleOrder:
        return SampleOrder([7, 3, 11], seed=3, num_streams=4, window_shards=1)

    forwards = samples(order(), 0, 100)
    fresh = [samples(order(), position, position + 1)[0] for position in reversed(range(100))]
    assert fresh[::-1] == forwards


def test_a_window_of_a_stream_reads_few_shards_and_steps_mix_the_streams() -> None:
    num_streams, window_shards, size = 5, 2, 30
    order = SampleOrder([size] * 50, seed=0, num_streams=num_streams, window_shards=window_shards)
    read = samples(order, 0, 50 * size)
    for stream in range(num_streams):
        window = read[stream::num_streams][: window_shards * size]
        assert len({shard for shard, _ in window}) <= window_shards + 1
        assert window != sorted(window)
    assert len({shard for shard, _ in read[: 8 * num_streams]}) >= num_streams


def test_planning_a_billion_samples_takes_megabytes() -> None:
    tracemalloc.start()
    try:
        order = SampleOrder([10_000] * 100_000, seed=0, num_streams=48, window_shards=4)
        epoch = order.num_samples
        assert epoch == 10**9
        scattered = [order.place(p) for p in range(0, 2 * epoch, epoch // 40 + 1)]
        consecutive = samples(order, 3 * epoch - 200, 3 * epoch)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100e6
    assert len(set(consecutive)) == 200
    assert all(0 <= p.shard < 100_000 and 0 <= p.member < 10_000 for p in scattered)


def test_an_order_in_use_goes_to_workers_that_do_not_start_by_a_fork() -> None:
    order = SampleOrder([5, 7], seed=1, num_streams=2, window_shards=1)
    places = [order.place(position) for position in range(30)]
    copy = pickle.loads(pickle.dumps(order))
    assert [copy.place(position) for position in range(30)] == places


def test_shards_without_samples_are_refused() -> None:
    with pytest.raises(UserError, match="no samples"):
        SampleOrder([0, 0], seed=0, num_streams=4, window_shards=1)


def rank_steps(plan: RunPlan, rank: int, first_step: int = 0) -> list[list[list[int]]]:
    """step -> micro-batch -> positions."""
    batches = list(rank_positions(plan, rank=rank, first_step=first_step))
    width = plan.accumulation
    assert len(batches) == width * (plan.steps - first_step)
    return [batches[i : i + width] for i in range(0, len(batches), width)]


@given(
    world=st.integers(1, 13),
    videos=st.integers(1, 5),
    accumulation=st.integers(1, 4),
    repeats=st.integers(1, 3),
    steps=st.integers(1, 5),
    skip=st.integers(0, 5),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ranks_are_disjoint_equal_and_together_the_global_batch(
    tiny: Callable[..., PretrainRecipe],
    world: int,
    videos: int,
    accumulation: int,
    repeats: int,
    steps: int,
    skip: int,
) -> None:
    per_step = world * videos * accumulation
    plan = dataclasses.replace(
        make_plan(tiny(), world_size=1),
        world_size=world,
        micro_batch=videos * repeats,
        accumulation=accumulation,
        repeats=repeats,
        videos_per_step=per_step,
        total_batch=per_step * repeats,
        steps=steps,
    )
    ranks = [rank_steps(plan, rank) for rank in range(world)]
    for step in range(steps):
        assert all(len(batch) == videos for rank in ranks for batch in rank[step])
        taken = sorted(p for rank in ranks for batch in rank[step] for p in batch)
        assert taken == list(range(step * per_step, (step + 1) * per_step))
    first = min(skip, steps)
    for rank in range(world):
        assert rank_steps(plan, rank, first) == ranks[rank][first:]


@given(sizes=SIZES, seed=st.integers(0, 2**40), repeats=st.sampled_from([1, 2]))
@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_each_step_takes_the_same_videos_whatever_the_world(
    tiny: Callable[..., PretrainRecipe], sizes: list[int], seed: int, repeats: int
) -> None:
    recipe = tiny(
        data={"repeats": repeats, "num_streams": 24},
        train={"max_steps": 5, "total_batch": 24 * repeats, "micro_batch": 4},
    )
    order = SampleOrder(sizes, seed=seed, num_streams=24, window_shards=1)
    worlds = []
    for world in WORLDS:
        plan = make_plan(recipe, world_size=world)
        ranks = [rank_steps(plan, rank) for rank in range(world)]
        positions = [
            sorted(p for rank in ranks for batch in rank[step] for p in batch)
            for step in range(plan.steps)
        ]
        assert all(len(step) == 24 for step in positions)
        worlds.append([{order.place(p) for p in step} for step in positions])
    assert all(steps == worlds[0] for steps in worlds)


def test_phases_continue_the_order_whatever_their_batches_and_the_world(
    tiny: Callable[..., PretrainRecipe],
) -> None:
    """No video is left out or taken twice, when every step is of another number of ranks."""
    tree = tiny(
        data={"num_streams": 24}, train={"max_steps": 10, "total_batch": 24, "micro_batch": 4}
    ).model_dump()
    tree["phases"] = [{"share": 0.3, "train.total_batch": 48}, {"share": 0.7}]
    recipe, position = validate(tree, "test"), 0
    for step, world in zip(range(10), itertools.cycle(WORLDS), strict=False):
        plan = make_plan(recipe, world_size=world)
        now = plan.part_at(step).plan
        taken = [
            p
            for rank in range(world)
            for batch in itertools.islice(
                rank_positions(plan, rank=rank, first_step=step), now.accumulation
            )
            for p in batch
        ]
        assert sorted(taken) == list(range(position, position + (48 if step < 3 else 24)))
        position += len(taken)


def test_ranks_that_share_tokens_load_the_same_clips(tiny: Callable[..., PretrainRecipe]) -> None:
    recipe = tiny(train={"total_batch": 8, "micro_batch": 2})
    shared = make_plan(recipe, world_size=4, sequence_parallel=2)
    alone = make_plan(recipe, world_size=2)
    for rank in range(4):
        assert rank_steps(shared, rank) == rank_steps(alone, rank // 2)


def test_the_order_is_the_one_that_checkpoints_count_in() -> None:
    """A changed order would make every saved position mean other videos."""
    digest = hashlib.sha256()
    sizes = [(shard * 37) % 11 for shard in range(60)]
    for seed, num_streams, window_shards in ((0, 1, 1), (7, 12, 2), (2**40, 60, 4)):
        order = SampleOrder(
            np.array(sizes, dtype=np.int32),
            seed=seed,
            num_streams=num_streams,
            window_shards=window_shards,
        )
        for position in range(3 * order.num_samples):
            place = order.place(position)
            digest.update(f"{place.epoch} {place.position} {place.shard} {place.member}\n".encode())
    golden = "2d833d6a3aaef90c7b4ec3a3597d7d1338aa6e8f83496ea76bce9ca3d3a40101"
    assert digest.hexdigest() == golden
