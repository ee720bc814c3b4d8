"""The moving average of the weights, by hand."""

from __future__ import annotations

import torch

from arvideo_ds.engine.build import Average


def test_it_follows_the_weights_by_its_decay() -> None:
    weights = torch.tensor([1.0, 2.0])
    average = Average([weights], 0.9)
    weights += 10
    average.update(torch.tensor(0.0))
    torch.testing.assert_close(average.of(weights), torch.tensor([2.0, 3.0]))
    average.update(torch.tensor(0.0))
    torch.testing.assert_close(average.of(weights), torch.tensor([2.9, 3.9]))


def test_a_refused_step_leaves_it_alone() -> None:
    weights = torch.tensor([1.0])
    average = Average([weights], 0.5)
    weights += 1
    average.update(torch.tensor(1.0))
    assert average.of(weights).item() == 1
