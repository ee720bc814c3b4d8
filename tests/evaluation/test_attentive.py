"""The attentive probe: it reads what the mean of the tokens hides, and leaves the encoder alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from arvideo_ds.config import PretrainRecipe
from arvideo_ds.evaluation.features import freeze
from arvideo_ds.evaluation.probing import AttentiveHead, AttentiveProbe
from arvideo_ds.models.encoder import build_encoder
from arvideo_ds.shards.manifest import ShardSet

WIDTH, TOKENS = 32, 10


def hidden_in_one_token(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One token, marked and anywhere, holds the sign; the others hold noise that drowns it."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(count, TOKENS, WIDTH, generator=generator)
    labels = torch.arange(count) % 2
    place = torch.randint(TOKENS, (count,), generator=generator)
    rows = torch.arange(count)
    tokens[rows, place, 0] = 8
    tokens[rows, place, 1] = 4 * (2.0 * labels - 1)
    return tokens, labels


def test_the_head_finds_the_token_that_knows() -> None:
    torch.manual_seed(0)
    head = AttentiveHead(WIDTH, 4, 2)
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    for step in range(200):
        tokens, labels = hidden_in_one_token(64, step)
        loss = torch.nn.functional.cross_entropy(head(tokens), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tokens, labels = hidden_in_one_token(500, 10_000)
    assert (head(tokens).argmax(1) == labels).float().mean() > 0.95


@pytest.mark.slow
def test_a_probe_of_videos_gives_the_same_figure_again_and_trains_the_head_alone(
    demo_shards: Path, tiny: Callable[..., PretrainRecipe]
) -> None:
    recipe = tiny()
    torch.manual_seed(0)
    encoder = build_encoder(recipe.encoder)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    shards = ShardSet(demo_shards / "train"), ShardSet(demo_shards / "test")
    figures = [AttentiveProbe(2).accuracy(freeze(encoder, recipe, *shards)) for _ in range(2)]
    assert figures[0] == figures[1]
    assert 0 <= figures[0] <= 1
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
