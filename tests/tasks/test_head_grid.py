"""Attentive heads trained together on a frozen encoder: each as if it were alone, one is chosen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from arvideo_ds.config import FinetuneRecipe, load_recipe
from arvideo_ds.data.loader import Batch
from arvideo_ds.errors import UserError
from arvideo_ds.models.classifier import Classifier, only_head
from arvideo_ds.optim.adamw import adamw
from arvideo_ds.shards.manifest import ShardSet
from arvideo_ds.tasks import task_of
from arvideo_ds.tasks.finetune import Finetune
from arvideo_ds.tasks.specs.finetune import Finetuning
from tests.tasks.test_finetune import CLASSES, batch_of

Make = Callable[..., FinetuneRecipe]
FROZEN: dict[str, Any] = {
    "train": "head",
    "pooling": "attentive",
    "pooling_depth": 2,
    "layer_decay": 1,
    "drop_path": 0,
    "mixup": 0,
    "cutmix": 0,
}
RATES, DECAYS = [1e-2, 1e-3], [0.0, 0.8]


def recipe_of(make: Make, rates: list[float], decays: list[float]) -> FinetuneRecipe:
    return make(
        data={"repeats": 2, "segments": True},
        finetune={**FROZEN, "head_lrs": rates, "head_weight_decays": decays},
        train={"seed": 3},
        optim={"base_lr": 1e-2},
    )


def trained(recipe: FinetuneRecipe, steps: int = 4) -> Finetune:
    """Trained as the engine does: the schedule's rate times the group's `lr_scale`."""
    torch.manual_seed(recipe.train.seed)
    task, module = Finetuning(recipe), Finetune(recipe, CLASSES)
    task.freeze(module)
    optimizer = adamw(task.parameter_groups(module), recipe.optim)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.optim.base_lr * (1 - step / steps) * group["lr_scale"]
        batch = batch_of(key=100 * step)
        batch.labels = batch.labels // 2 * 2  # of the two clips of a video
        module(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return module


def test_heads_trained_together_equal_heads_trained_alone(tiny_finetune: Make) -> None:
    together = trained(recipe_of(tiny_finetune, RATES, DECAYS)).model.heads
    states = [head.state_dict() for head in together]
    pairs = [(rate, decay) for rate in RATES for decay in DECAYS]
    for state, (rate, decay) in zip(states, pairs, strict=True):
        (alone,) = trained(recipe_of(tiny_finetune, [rate], [decay])).model.heads
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=0, atol=1e-6)
    for one, other in ((0, 1), (0, 2)):
        name = "class_attention.kv.weight"
        assert (states[one][name] - states[other][name]).abs().max() > 1e-4


def test_the_encoder_runs_once_per_batch_and_learns_nothing(tiny_finetune: Make) -> None:
    module = trained(recipe_of(tiny_finetune, RATES, DECAYS), steps=0)
    before = {name: value.clone() for name, value in module.model.encoder.state_dict().items()}
    calls: list[int] = []
    module.model.encoder.register_forward_hook(lambda *_: calls.append(1))
    module(batch_of()).backward()
    assert len(calls) == 1
    assert all(p.grad is None for p in module.model.encoder.parameters())
    assert all(torch.equal(v, before[n]) for n, v in module.model.encoder.state_dict().items())


def test_one_head_leaves_as_a_plain_classifier(tiny_finetune: Make) -> None:
    recipe = recipe_of(tiny_finetune, RATES, DECAYS)
    module, clips = trained(recipe).eval(), batch_of().clips
    state = Finetuning(recipe).exported(module.model.state_dict(), {"validation/head": 2})
    depth = recipe.pooling_depth
    plain = Classifier(recipe.encoder, CLASSES, pooling=recipe.pooling, pooling_depth=depth).eval()
    plain.load_state_dict(state)
    logits = module.model(clips, views=(2, 1)).unflatten(1, (4, CLASSES))
    assert torch.equal(plain(clips, views=(2, 1)), logits[:, 2])
    assert set(only_head(module.model.state_dict(), 2)) == set(state)


def test_temporal_views_are_pooled_together_and_spatial_ones_apart(tiny_finetune: Make) -> None:
    recipe = recipe_of(tiny_finetune, RATES, DECAYS)
    model = trained(recipe).model.eval()
    # Two temporal x two spatial views of a video; the temporal ones are outermost.
    clips, views = batch_of(4).clips, (2, 2)
    logits = model(clips, views=views)
    for spatial in (0, 1):
        alone = model(clips[spatial::2], views=(2, 1))
        torch.testing.assert_close(logits[spatial::2], alone)
        assert torch.equal(logits[spatial], logits[spatial + 2])
    assert not torch.equal(logits[0], logits[1])
    changed = clips.clone()
    changed[2] = 0
    again = model(changed, views=views)
    assert not torch.equal(again[0], logits[0])
    torch.testing.assert_close(again[1], logits[1])


def test_the_first_head_with_the_highest_validation_is_chosen(
    demo_shards: Path, tiny_finetune: Make
) -> None:
    """Every head's top-1 is reported beside it."""
    recipe = recipe_of(tiny_finetune, RATES, DECAYS)
    task, shards = task_of(recipe), ShardSet(demo_shards / "test")

    def predict(batch: Batch) -> Tensor:
        """Heads 1 and 3 know the label, head 0 says class 0, head 2 has nothing finite."""
        right = torch.nn.functional.one_hot(batch.labels, 8).float()
        heads = [torch.eye(8)[torch.zeros_like(batch.labels)], right, right * torch.nan, right]
        return torch.cat(heads, dim=1)

    options = {"num_workers": 0, "device": torch.device("cpu")}
    metrics = task.validation(shards)(predict, **options)
    assert metrics["head"] == 1
    assert metrics["top1"] == metrics["top5"] == 100
    assert metrics["videos"] == shards.num_samples
    each = [metrics[name] for name in task.recorded if name != "head"]
    assert each[1] == each[3] == 100
    assert each[0] == pytest.approx(12.5)
    assert each[2] < 50
    assert "of the best head" in task.metric_words(metrics)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["finetune.head_weight_decays=[]"], "belong together"),
        (["finetune.train=all"], "Set finetune.train=head"),
        (["finetune.pooling=mean", "finetune.pooling_depth=4"], "Set finetune.pooling=attentive"),
        (["finetune.heads=[verb,noun]"], "Set finetune.heads=null"),
        (["optim.clip=1"], "optim.clip=0"),
        (["train.precision=fp16"], "optim.clip=0"),
        (["finetune.head_lrs=[]", "finetune.head_weight_decays=[]", "finetune.pooling=mean",
          "finetune.pooling_depth=2"], "has no effect"),
    ],
)  # fmt: skip
def test_what_would_couple_heads_or_have_no_effect_is_refused(
    overrides: list[str], words: str
) -> None:
    with pytest.raises(UserError) as refused:
        load_recipe("probe_own", overrides, FinetuneRecipe)
    assert words in str(refused.value)


def test_without_videos_to_choose_on_the_run_is_refused(
    demo_shards: Path, tiny_finetune: Make
) -> None:
    recipe = recipe_of(tiny_finetune, RATES, DECAYS)
    plan: Any = type("Plan", (), {"micro_batch": 8, "sequence_parallel": 1})
    with pytest.raises(UserError, match=r"set evaluation\.shards"):
        task_of(recipe).check(plan, ShardSet(demo_shards / "train"), None)
