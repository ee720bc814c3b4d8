"""The fine-tuning task: draws come from keys, and what did not decode teaches nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from arvideo_ds.config import FinetuneRecipe
from arvideo_ds.data.loader import Batch
from arvideo_ds.tasks.finetune import Finetune

CLASSES = 5
Make = Callable[..., FinetuneRecipe]
PLAIN: dict[str, object] = {"mixup": 0, "cutmix": 0, "drop_path": 0}


def task_of(recipe: FinetuneRecipe) -> Finetune:
    torch.manual_seed(0)
    task = Finetune(recipe, CLASSES)
    torch.nn.init.normal_(task.model.head.weight)
    return task


def batch_of(
    count: int = 4,
    *,
    key: int = 7,
    labels: list[int] | None = None,
    valid: list[bool] | None = None,
) -> Batch:
    generator = torch.Generator().manual_seed(0)
    clips = torch.randint(0, 256, (count, 8, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return Batch(
        clips,
        torch.arange(count) + key,
        torch.tensor(labels or [n % CLASSES for n in range(count)]),
        torch.tensor(valid or [True] * count),
        first_key=key,
    )


def loss_and_gradient(task: Finetune, batch: Batch) -> tuple[Tensor, Tensor]:
    task.zero_grad()
    loss = task(batch)
    loss.backward()
    parts = [p.grad.flatten() for p in task.parameters() if p.grad is not None]
    return loss.detach(), torch.cat(parts)


def test_without_mixing_the_loss_is_smoothed_cross_entropy(tiny_finetune: Make) -> None:
    task, batch = task_of(tiny_finetune(finetune=PLAIN)), batch_of()
    expected = torch.nn.functional.cross_entropy(
        task.model(batch.clips), batch.labels, label_smoothing=0.1
    )
    torch.testing.assert_close(task(batch), expected)


@pytest.mark.parametrize("settings", [{}, {"mixup": 0}, {"cutmix": 0}, PLAIN | {"drop_path": 0.5}])
def test_all_draws_are_functions_of_the_first_key(
    settings: dict[str, object], tiny_finetune: Make
) -> None:
    task = task_of(tiny_finetune(finetune=settings))
    first = loss_and_gradient(task, batch_of())
    torch.manual_seed(99)
    torch.rand(3)
    again = loss_and_gradient(task, batch_of())
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    others = {task(batch_of(key=key)).item() for key in range(100, 105)}
    assert len(others) > 1


def test_the_global_generators_are_left_as_they_were(tiny_finetune: Make) -> None:
    task = task_of(tiny_finetune())
    before = torch.get_rng_state()
    task(batch_of())
    assert torch.equal(torch.get_rng_state(), before)


def test_the_batch_itself_is_not_mixed(tiny_finetune: Make) -> None:
    task, batch = task_of(tiny_finetune()), batch_of()
    before = batch.clips.clone()
    task(batch)
    assert torch.equal(batch.clips, before)


@pytest.mark.parametrize("settings", [{}, PLAIN])
def test_what_did_not_decode_or_has_no_label_teaches_nothing(
    settings: dict[str, object], tiny_finetune: Make
) -> None:
    task = task_of(tiny_finetune(finetune=settings | {"drop_path": 0}))
    # Mirror places are mixed with each other, so both ends go.
    unusable = (
        batch_of(6, valid=[False, True, True, True, True, False]),
        batch_of(6, labels=[-1, 1, 2, 3, 4, -1]),
    )
    results = []
    for batch in unusable:
        for noise in (0, 255):
            batch.clips[[0, 5]] = noise
            results.append(loss_and_gradient(task, batch))
    for loss, gradient in results[1:]:
        torch.testing.assert_close(loss, results[0][0])
        torch.testing.assert_close(gradient, results[0][1])
    loss, gradient = loss_and_gradient(task, batch_of(2, valid=[False, False]))
    assert loss == 0
    assert not gradient.any()


def test_in_evaluation_it_gives_logits(tiny_finetune: Make) -> None:
    task, batch = task_of(tiny_finetune()).eval(), batch_of()
    assert torch.equal(task(batch), task.model(batch.clips))
    assert task(batch).shape == (4, CLASSES)
