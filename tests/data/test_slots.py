"""Memory of batches is used again, but never while a tensor refers to it."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from arvideo_ds.config import PretrainRecipe
from arvideo_ds.data.loader import Batch, TrainLoader
from arvideo_ds.data.slots import Slots
from arvideo_ds.planning.plan import make_plan
from arvideo_ds.shards.manifest import ShardSet

STEPS = 24


@pytest.fixture(scope="module")
def shards(demo_shards: Path) -> ShardSet:
    return ShardSet(demo_shards / "train")


@pytest.fixture
def load(shards: ShardSet, tiny: Callable[..., PretrainRecipe]) -> Callable[[int], Iterator[Batch]]:
    recipe = tiny(train={"max_steps": STEPS})
    plan = make_plan(recipe, world_size=1, num_videos=shards.num_samples)

    def run(workers: int) -> Iterator[Batch]:
        return iter(
            TrainLoader(
                shards, recipe, plan, rank=0, first_step=0, num_workers=workers, pin_memory=False
            )
        )

    return run


def test_batches_that_are_not_kept_share_their_memory(
    load: Callable[[int], Iterator[Batch]],
) -> None:
    places = [batch.clips.data_ptr() for batch in load(1)]
    assert len(places) == STEPS
    assert len(set(places)) <= 2 + 3, "prefetched, and in use"


def test_what_is_kept_is_never_written_to(load: Callable[[int], Iterator[Batch]]) -> None:
    """Of every batch a view, of every third the whole batch; more than there are slots."""
    kept = [
        (batch.clips[2:4], batch if number % 3 == 0 else None)
        for number, batch in enumerate(load(2))
    ]
    for (view, whole), batch in zip(kept, load(0), strict=True):
        assert torch.equal(view, batch.clips[2:4])
        assert whole is None or torch.equal(whole.clips, batch.clips)


def test_a_slot_is_free_again_when_the_last_view_is_gone() -> None:
    slots = Slots(2, 12)
    first, second = slots.take(), slots.take()
    assert (first, second, slots.take()) == (0, 1, None), "both are being filled"
    slots.memory(0)[:6] = torch.arange(6, dtype=torch.uint8)
    sent = pickle.dumps(slots.filled(0, slots.memory(0)[:6].view(2, 3)))
    clips = pickle.loads(sent)
    assert clips.tolist() == [[0, 1, 2], [3, 4, 5]]
    row = clips[1]
    del clips
    assert slots.take() is None
    del row
    assert slots.take() == 0
