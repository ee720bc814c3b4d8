"""The pretraining task: clips that did not decode change neither the loss nor its gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from arvideo_ds.config import PretrainRecipe
from arvideo_ds.data.loader import Batch
from arvideo_ds.models.encoder import encode_clips
from arvideo_ds.tasks import PREFIX
from arvideo_ds.tasks.pretrain import Pretrain


@pytest.fixture
def task(tiny: Callable[..., PretrainRecipe]) -> Pretrain:
    torch.manual_seed(0)
    return Pretrain(tiny(data={"frames": 4, "size": 16}, objective={"cluster": [1, 2, 2]}))


def batch_of(clips: Tensor, valid: list[bool]) -> Batch:
    count = len(clips)
    return Batch(clips, torch.arange(count) + 7, torch.full((count,), -1), torch.tensor(valid))


def noise(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 4, 16, 16, 3), dtype=torch.uint8, generator=generator)


def loss_and_gradient(task: Pretrain, batch: Batch) -> tuple[Tensor, Tensor]:
    task.zero_grad()
    loss = task(batch)
    loss.backward()
    parts = [p.grad.flatten() for p in task.parameters() if p.grad is not None]
    return loss.detach(), torch.cat(parts)


def test_clips_that_did_not_decode_change_neither_loss_nor_gradient(task: Pretrain) -> None:
    clips = noise(4)
    alone = loss_and_gradient(task, batch_of(clips[:2], [True, True]))
    for content in (torch.zeros_like(clips[2:]), noise(2, seed=1)):
        padded = torch.cat([clips[:2], content])
        beside = loss_and_gradient(task, batch_of(padded, [True, True, False, False]))
        torch.testing.assert_close(beside, alone)
    # They would have counted.
    counted = loss_and_gradient(task, batch_of(clips, [True] * 4))
    assert not torch.allclose(counted[0], alone[0])


def test_the_loss_is_the_mean_over_the_clips_that_decoded(task: Pretrain) -> None:
    batch = batch_of(noise(3), [True, False, True])
    per_clip = task.model(batch.clips, batch.keys)
    torch.testing.assert_close(task(batch), (per_clip[0] + per_clip[2]) / 2)


def test_in_evaluation_it_gives_all_tokens(task: Pretrain) -> None:
    batch = batch_of(noise(2), [True, True])
    tokens = task.eval()(batch)
    assert torch.equal(tokens, encode_clips(task.model.encoder, batch.clips, task.patch))


def test_a_batch_without_any_clip_gives_zero_and_a_gradient_of_zeros(task: Pretrain) -> None:
    loss, gradient = loss_and_gradient(task, batch_of(torch.zeros_like(noise(2)), [False] * 2))
    assert loss == 0
    assert len(gradient) == sum(p.numel() for p in task.parameters())  # every rank has gradients
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_weights_of_the_objective_stand_below_the_prefix(task: Pretrain) -> None:
    names = [name.removeprefix(PREFIX) for name in task.state_dict()]
    assert names == list(task.model.state_dict())


def predicting(value: Tensor | float, task: Pretrain, batch: Batch) -> float:
    """Mean loss, clip by clip, of a model that always predicts `value`."""
    losses = []
    for number in batch.valid.nonzero().flatten().tolist():
        one = slice(number, number + 1)
        codes = None if batch.codes is None else batch.codes[one]
        targets = task.model.target_values(batch.clips[one], batch.keys[one], None, codes)
        losses.append((targets - value).square().mean().item())
    return sum(losses) / len(losses)


def baseline_of(task: Pretrain, batch: Batch) -> float:
    loss, count = task.baseline(batch).tolist()
    assert count == batch.valid.sum()
    return loss / count


@pytest.mark.parametrize("cluster", [[1, 2, 2], [2, 2, 2]])
def test_predicting_the_mean_of_normalised_cubes_has_the_loss_that_algebra_says(
    cluster: list[int], tiny: Callable[..., PretrainRecipe]
) -> None:
    """Unbiased variance over P pixels: the mean square of a cube's targets is (P - 1) / P."""
    task = Pretrain(tiny(data={"frames": 4, "size": 16}, objective={"cluster": cluster}))
    batch = batch_of(noise(3), [True, False, True])
    pixels = 2 * 4 * 4
    assert baseline_of(task, batch) == pytest.approx((pixels - 1) / pixels, rel=1e-4)
    assert baseline_of(task, batch) == pytest.approx(predicting(0.0, task, batch), rel=1e-6)


def test_cubes_of_one_colour_have_nothing_to_predict(task: Pretrain) -> None:
    clips = torch.full_like(noise(2), 90)
    assert baseline_of(task, batch_of(clips, [True, True])) == 0


def test_no_constant_is_a_better_prediction_of_pixels_than_the_baseline(
    tiny: Callable[..., PretrainRecipe],
) -> None:
    objective = {"cluster": [1, 2, 2], "normalize_targets": False}
    task = Pretrain(tiny(data={"frames": 4, "size": 16}, objective=objective))
    batch = batch_of(noise(3) // 2, [True, False, True])
    batch.clips[1] = 255  # did not decode: must not count
    found = baseline_of(task, batch)
    means = task.model.target_values(batch.clips[[0, 2]], batch.keys[[0, 2]]).mean(dim=(0, 1))
    assert found == pytest.approx(predicting(means, task, batch), rel=1e-5)
    for other in (means + 0.01, means - 0.01, means.mean(), 0.0, 0.5):
        assert predicting(other, task, batch) > found


def test_latents_have_the_loss_of_predicting_their_mean(
    tiny: Callable[..., PretrainRecipe],
) -> None:
    objective = {"name": "lvmae", "mask_ratio": 0.75, "decoder_mask": "random"}
    task = Pretrain(tiny(data={"frames": 4, "size": 16}, objective=objective))
    batch = batch_of(noise(4), [True] * 4)
    batch.codes = torch.randint(0, 8**6, (4, 2 * 4 * 4), generator=torch.manual_seed(0))
    targets = task.model.target_values(batch.clips, batch.keys, None, batch.codes)
    means = targets.mean(dim=(0, 1))
    assert baseline_of(task, batch) == pytest.approx(predicting(means, task, batch), rel=1e-5)
