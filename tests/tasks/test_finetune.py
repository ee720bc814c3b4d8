"""The fine-tuning task: draws come from keys, and what did not decode teaches nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from arvideo_ds.config import FinetuneRecipe
from arvideo_ds.data.loader import Batch
from arvideo_ds.errors import UserError
from arvideo_ds.models.cubes import from_cubes, to_cubes
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


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mixup": 0},
        {"cutmix": 0},
        PLAIN | {"drop_path": 0.5},
        PLAIN | {"head_dropout": 0.5},
    ],
)
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


DROPS = PLAIN | {"drop_tokens": 0.25, "label_smoothing": 0.0}


def test_dropped_tubes_are_seen_neither_by_the_loss_nor_by_the_gradient(
    tiny_finetune: Make,
) -> None:
    recipe = tiny_finetune(finetune=DROPS)
    task, batch = task_of(recipe), batch_of()
    seen = task._seen(batch.keys)
    assert seen is not None
    # 4 times, 64 places of which 48 are seen, the same ones at all times.
    assert seen.shape == (4, recipe.counts.encoded) == (4, 192)
    places = seen.view(4, 4, 48) % 64
    assert torch.equal(places, places[:, :1].expand_as(places))
    before = loss_and_gradient(task, batch)
    hidden = ~torch.zeros(4, 256, dtype=torch.bool).scatter(1, seen, value=True)
    cubes = to_cubes(batch.clips, recipe.patch)
    cubes[hidden] = 255 - cubes[hidden]
    batch.clips = from_cubes(cubes, recipe.patch, recipe.geometry.grid)
    after = loss_and_gradient(task, batch)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    # What is seen does count.
    batch.clips = 255 - batch.clips
    assert task(batch) != before[0]


def test_which_tubes_are_dropped_is_a_function_of_each_clips_key(tiny_finetune: Make) -> None:
    task = task_of(tiny_finetune(finetune=DROPS))
    keys = torch.arange(40)
    seen = task._seen(keys)
    assert seen is not None
    assert len({tuple(row.tolist()) for row in seen}) == 40
    # No place is always left out.
    assert len(seen.unique()) == 256
    again = task._seen(keys.flip(0))
    assert again is not None
    assert torch.equal(seen, again.flip(0))


def test_a_test_sees_all_tokens(tiny_finetune: Make) -> None:
    task = task_of(tiny_finetune(finetune=DROPS)).eval()
    plain = task_of(tiny_finetune(finetune=PLAIN)).eval()
    assert torch.equal(task(batch_of()), plain(batch_of()))


def test_class_attention_classifies_what_one_query_reads_of_the_tokens(
    tiny_finetune: Make,
) -> None:
    task = task_of(tiny_finetune(finetune=DROPS | {"pooling": "attention"})).eval()
    model = task.model
    tokens = torch.randn(2, 6, 128, generator=torch.Generator().manual_seed(0))
    pooled = model.pool(tokens)
    assert pooled.shape == (2, 128)
    # A set of tokens has no order; which tokens there are matters.
    torch.testing.assert_close(model.pool(tokens.flip(1)), pooled)
    assert not torch.allclose(model.pool(tokens[:, 1:]), pooled)
    assert task(batch_of()).shape == (4, CLASSES)
    loss, gradient = loss_and_gradient(task.train(), batch_of())
    assert loss > 0 and gradient.isfinite().all()
    assert all(p.grad is not None for p in model.parameters())


def test_motion_pooling_classifies_the_changes_within_every_clip(tiny_finetune: Make) -> None:
    task = task_of(tiny_finetune(finetune=DROPS | {"pooling": "motion"})).eval()
    model, times = task.model, 4
    tokens = torch.randn(3, times, 5, 128, generator=torch.Generator().manual_seed(0))
    still = torch.randn(3, 1, 5, 128, generator=torch.Generator().manual_seed(1))
    pooled = model.pool(tokens.flatten(1, 2))
    torch.testing.assert_close(pooled, tokens.diff(dim=1).abs().mean((1, 2)))
    torch.testing.assert_close(model.pool((tokens + still).flatten(1, 2)), pooled)
    # Two clips of a video: no change from one clip to the next.
    together = model.pool(tokens[:2].flatten(0, 2)[None], clips=2)
    torch.testing.assert_close(together[0], pooled[:2].mean(0))
    loss, gradient = loss_and_gradient(task.train(), batch_of())
    assert loss > 0 and gradient.isfinite().all()


def test_motion_pooling_needs_two_times(tiny_finetune: Make) -> None:
    with pytest.raises(UserError, match=r"data.frames=2 gives only one time.*pooling=mean"):
        tiny_finetune(finetune={"pooling": "motion"}, data={"frames": 2})


@pytest.mark.parametrize("settings", [PLAIN, {"drop_path": 0}, {"drop_tokens": 0.25}])
def test_the_loss_of_two_heads_is_the_sum_of_both_alone(
    settings: dict[str, object], tiny_finetune: Make
) -> None:
    """Also where clips are mixed: one draw for both."""
    both = Finetune(tiny_finetune(finetune=settings | {"heads": ["verb", "noun"]}), 5, 3)
    torch.nn.init.normal_(both.model.head.weight)
    verb, noun = [0, 4, 2, 1], [2, 0, 1, 1]
    batch = batch_of()
    batch.labels = torch.tensor([verb, noun]).T
    losses = []
    for labels, rows in ((verb, slice(0, 5)), (noun, slice(5, 8))):
        alone = Finetune(tiny_finetune(finetune=settings), rows.stop - rows.start)
        state = both.state_dict()
        for name in ("weight", "bias"):
            state[f"model.head.{name}"] = state[f"model.head.{name}"][rows]
        alone.load_state_dict(state)
        losses.append(alone(batch_of(labels=labels)))
    torch.testing.assert_close(both(batch), sum(losses))


def test_a_clip_that_lacks_one_label_teaches_nothing(tiny_finetune: Make) -> None:
    task = Finetune(tiny_finetune(finetune=PLAIN | {"heads": ["verb", "noun"]}), 5, 3)
    torch.nn.init.normal_(task.model.head.weight)
    batch = batch_of()
    batch.labels = torch.tensor([[0, 1], [2, -1], [3, 2], [-1, -1]])
    first = loss_and_gradient(task, batch)
    batch.clips[[1, 3]] = 255 - batch.clips[[1, 3]]
    again = loss_and_gradient(task, batch)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


def test_head_dropout_hides_features_from_the_linear_layer_in_training_alone(
    tiny_finetune: Make,
) -> None:
    """VideoMAE's --fc_drop_rate: after the norm, before the linear layer."""
    share = 0.5
    task = task_of(tiny_finetune(finetune=PLAIN | {"head_dropout": share}))
    plain = task_of(tiny_finetune(finetune=PLAIN))
    seen: list[Tensor] = []
    task.model.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    assert task(batch_of()) != plain(batch_of())
    assert torch.equal(task.eval()(batch_of()), plain.eval()(batch_of()))
    trained, tested = seen
    dropped = trained == 0
    assert 0.4 < dropped.float().mean() < 0.6
    # What stays is scaled, so its expectation is that of the test.
    torch.testing.assert_close(trained, (tested / (1 - share)).masked_fill(dropped, 0))
    # Every clip of a micro-batch loses other features.
    assert len({tuple(row.tolist()) for row in dropped}) == len(dropped)
    # It has no weights: exports and checkpoints stay as they were.
    assert task.state_dict().keys() == plain.state_dict().keys()
