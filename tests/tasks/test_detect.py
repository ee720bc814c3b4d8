"""The detection task: every box weighs the same, clips that did not decode weigh nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from arvideo_ds.config import DetectRecipe
from arvideo_ds.data.detection import DetectionBatch
from arvideo_ds.tasks.detect import Detect

MakeRecipe = Callable[..., DetectRecipe]


@pytest.fixture
def task(ava_recipe: MakeRecipe) -> Detect:
    torch.manual_seed(0)
    made = Detect(ava_recipe(data={"frames": 4, "size": 16}, detect={"drop_path": 0.0}))
    torch.nn.init.normal_(made.model.head.weight, std=0.1)
    return made


def batch_of(counts: list[int], valid: list[bool] | None = None, seed: int = 0) -> DetectionBatch:
    """Clips with so many boxes each."""
    generator = torch.Generator().manual_seed(seed)
    clips, boxes = len(counts), sum(counts)
    corners = torch.rand(boxes, 2, generator=generator) * 8
    return DetectionBatch(
        clips=torch.randint(256, (clips, 4, 16, 16, 3), dtype=torch.uint8, generator=generator),
        keys=torch.arange(clips) + 7,
        labels=torch.full((clips,), -1),
        valid=torch.tensor(valid or [True] * clips),
        boxes=torch.cat([corners, corners + 6], dim=1),
        clip_of=torch.arange(clips).repeat_interleave(torch.tensor(counts)),
        targets=torch.rand(boxes, 3, generator=generator) > 0.5,
        in_frame=torch.zeros(boxes, 4),
        person_scores=torch.ones(boxes),
        keyframes=[("film", number) for number in range(clips)],
    )


def part(batch: DetectionBatch, places: list[int]) -> DetectionBatch:
    own = torch.isin(batch.clip_of, torch.tensor(places))
    return replace(
        batch,
        clips=batch.clips[places],
        keys=batch.keys[places],
        labels=batch.labels[places],
        valid=batch.valid[places],
        boxes=batch.boxes[own],
        clip_of=batch.clip_of[own] - places[0],
        targets=batch.targets[own],
        keyframes=[batch.keyframes[place] for place in places],
    )


def loss_and_gradient(task: Detect, batch: DetectionBatch) -> tuple[Tensor, Tensor]:
    task.zero_grad()
    loss = task(batch)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in task.parameters()])  # type: ignore


def test_the_loss_is_the_cross_entropy_of_every_action_in_every_box(task: Detect) -> None:
    batch = batch_of([2, 1])
    logits = task.model(batch.clips, batch.boxes, batch.clip_of)
    each = F.binary_cross_entropy(logits.sigmoid(), batch.targets.float(), reduction="none")
    torch.testing.assert_close(task(batch), each.mean(1).sum() / 2)


def test_two_micro_batches_are_one_batch_however_many_boxes_they_have(task: Detect) -> None:
    batch = batch_of([5, 1, 0, 2])
    whole = loss_and_gradient(task, batch)
    halves = [loss_and_gradient(task, part(batch, places)) for places in ([0, 1], [2, 3])]
    for number in range(2):
        mean = (halves[0][number] + halves[1][number]) / 2
        torch.testing.assert_close(mean, whole[number], atol=1e-6, rtol=1e-4)


def test_clips_that_did_not_decode_change_neither_loss_nor_gradient(task: Detect) -> None:
    batch = batch_of([2, 1, 0], [True, True, False])
    alone = loss_and_gradient(task, part(batch, [0, 1]))
    torch.testing.assert_close(loss_and_gradient(task, batch), alone)


def test_a_batch_without_any_box_gives_zero_and_a_gradient_of_zeros(task: Detect) -> None:
    loss, gradient = loss_and_gradient(task, batch_of([0, 0]))
    assert loss == 0
    assert not gradient.any()


def test_a_step_drops_the_same_branches_again(ava_recipe: MakeRecipe) -> None:
    task = Detect(ava_recipe(data={"frames": 4, "size": 16}, detect={"drop_path": 0.5}))
    torch.nn.init.normal_(task.model.head.weight, std=0.1)
    batch = batch_of([1, 2])
    first = task(batch)
    torch.rand(3)
    torch.testing.assert_close(task(batch), first)
    assert any(task(replace(batch, first_key=key)) != first for key in range(1, 9))


def test_in_evaluation_it_gives_logits(task: Detect) -> None:
    batch = batch_of([2, 1])
    assert task.eval()(batch).shape == (3, 3)


def test_boxes_of_a_clip_that_another_rank_of_its_group_could_not_decode_weigh_nothing(
    task: Detect,
) -> None:
    """Ranks that share a clip's tokens agree on `valid`; those that decoded it have its boxes."""
    together = loss_and_gradient(task, batch_of([2, 3, 1], valid=[True, False, True]))
    batch = batch_of([2, 3, 1])
    parts = [loss_and_gradient(task, part(batch, [place])) for place in (0, 2)]
    for number in range(2):
        mean = (parts[0][number] + parts[1][number]) / 2
        torch.testing.assert_close(together[number], mean)
