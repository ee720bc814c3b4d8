"""What a run says of itself when it starts."""

from __future__ import annotations

import pytest

from arvideo_ds.config import FinetuneRecipe, load_recipe, make_plan
from arvideo_ds.train.record import _tokens


@pytest.mark.parametrize(("share", "said"), [(0.2, ", 10048 encoded"), (0.0, ", all encoded")])
def test_the_header_says_how_many_tokens_training_encodes(share: float, said: str) -> None:
    overrides = [f"finetune.drop_tokens={share}"]
    recipe = load_recipe("finetune_vit_b_diving48_128f", overrides, FinetuneRecipe)
    assert _tokens(recipe, make_plan(recipe, world_size=1)) == said
