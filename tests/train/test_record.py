"""What a run says of itself when it starts."""

from __future__ import annotations

import pytest

from arvideo_ds.config import FinetuneRecipe, load_recipe
from arvideo_ds.planning.plan import batch_words, make_plan, schedule_words
from arvideo_ds.tasks import task_of


@pytest.mark.parametrize(("share", "said"), [(0.2, ", 10048 encoded"), (0.0, ", all encoded")])
def test_the_header_says_how_many_tokens_training_encodes(share: float, said: str) -> None:
    overrides = [f"finetune.drop_tokens={share}"]
    recipe = load_recipe("finetune_vit_b_diving48_128f", overrides, FinetuneRecipe)
    assert task_of(recipe).token_words(make_plan(recipe, world_size=1)) == said


def test_the_header_says_videos_and_clips_of_a_step_and_the_rates_that_they_make() -> None:
    recipe = load_recipe(
        "finetune_vit_b_k400", ["train.total_batch=512", "data.repeats=2"], FinetuneRecipe
    )
    plan = make_plan(recipe, world_size=8)
    assert "256 videos x 2 clips = 512 clips" in batch_words(plan)
    rates = "warm-up from 1.000e-06 to 5.000e-04, then down to 1.000e-06"
    assert rates in schedule_words(plan)
