"""Every task trains on an accelerator, and the host never waits for it.

Without one, the meta device stands in: it computes nothing, so whoever asks for a value, or for as
many elements as a value says, fails there, as do types that do not go together; and what the host
sends up is seen in the operators that are called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.models import vgg16

from arvideo_ds.config import FinetuneRecipe, PretrainRecipe, Recipe, TokenizerRecipe
from arvideo_ds.config.load import validate
from arvideo_ds.data.loader import Batch
from arvideo_ds.long_video.training import Perceptual, TrainTokenizer
from arvideo_ds.tasks.finetune import Finetune
from arvideo_ds.tasks.pretrain import Pretrain

aten = torch.ops.aten
CLIPS, CLASSES, CODES = 4, 3, 512
STILL = {"drop_path": 0.0}  # its draws are the device's own
SMALL = {"filters": 4, "multipliers": [1, 2, 2], "blocks": 1, "samples": 8}
TASKS: dict[str, dict[str, Any]] = {
    "arvideo": {"objective": {"cluster": [2, 4, 4]}},
    "arvideo scores": {
        "objective": {"cluster": [2, 4, 4]},
        "decoder": {"target_rule": "scores", "target_ratio": 0.25},
    },
    "videomae": {"objective": {"name": "videomae"}},
    "videomae v2": {"objective": {"name": "videomae", "decoder_mask": "running_cell"}},
    "lvmae": {"objective": {"name": "lvmae", "latent_levels": [8, 8, 8]}},
    "lvmae cells": {
        "objective": {"name": "lvmae", "decoder_mask": "running_cell", "targets": "pixels"}
    },
    "lvmae times": {"objective": {"name": "lvmae", "decoder_mask": "uniform"}},
    "finetune": {"task": "finetune", "finetune": STILL},
    "finetune heads": {
        "task": "finetune",
        "finetune": {
            **STILL,
            "heads": ["verb", "noun"],
            "drop_tokens": 0.5,
            "pooling": "attention",
            "mixup": 0,
            "cutmix": 0,
        },
    },
    "tokenizer": {"task": "tokenizer", "tokenizer": SMALL},
    "tokenizer perceptual": {"task": "tokenizer", "tokenizer": SMALL},
}


class HostWaits(TorchDispatchMode):
    """Operators that bring what lies on the host to the device, which waits for all work there.

    A number is none: it goes along with the operator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._constants = Constants(self.found)

    def __enter__(self) -> HostWaits:
        self._constants.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._constants.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        copies = func in (aten._to_copy.default, aten.copy_.default)
        sent = any(t.device.type == "cpu" and (t.ndim or copies) for t in given)
        if isinstance(out, Tensor) and out.is_meta and sent:
            self.found.append(str(func))
        return out


class Constants(TorchFunctionMode):
    """Tensors made of Python's numbers, which torch sends to the device before any operator."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor) and out.is_meta:
            self._found.append(func.__name__)
        return out


def recipe_of(name: str) -> Recipe:
    kinds = {"finetune": FinetuneRecipe, "tokenizer": TokenizerRecipe}
    tree = TASKS[name]
    tokenizer = tree.get("task") == "tokenizer"
    whole = {
        **tree,
        "model": {"patch": [2, 4, 4], **({} if tokenizer else {"size": "tiny"})},
        "data": {"frames": 8, "size": 16, "num_videos": 48, "num_streams": 12},
        "train": {"max_steps": 2, "total_batch": 4, "micro_batch": 4, "precision": "fp32"},
    }
    return validate(whole, name, kinds.get(tree.get("task", ""), PretrainRecipe))


def task_of(name: str) -> nn.Module:
    recipe = recipe_of(name)
    torch.manual_seed(0)
    if isinstance(recipe, FinetuneRecipe):
        return Finetune(recipe, *[CLASSES] * len(recipe.finetune.heads or "1"))
    if isinstance(recipe, TokenizerRecipe):
        task = TrainTokenizer(recipe)
        if name.endswith("perceptual"):
            task.perceptual = vgg()
        return task
    assert isinstance(recipe, PretrainRecipe)
    return Pretrain(recipe)


def vgg() -> Perceptual:
    """VGG16's features up to the last that are looked at, with random weights."""
    layers = vgg16(weights=None, init_weights=False).features[:30]
    for layer in layers:
        layer.inplace = False
    return Perceptual(layers)


def batch_of(name: str) -> Batch:
    recipe = recipe_of(name)
    heads = len(recipe.finetune.heads or ()) if isinstance(recipe, FinetuneRecipe) else 0
    torch.manual_seed(1)
    tokens = (CLIPS, recipe.geometry.num_tokens)
    return Batch(
        torch.randint(0, 256, (CLIPS, *recipe.geometry.clip, 3), dtype=torch.uint8),
        torch.arange(CLIPS),
        torch.randint(0, CLASSES, (CLIPS, heads) if heads else (CLIPS,)),
        torch.tensor([True] * (CLIPS - 1) + [False]),
        scores=torch.rand(tokens),
        codes=torch.randint(0, CODES, tokens),
    )


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TASKS)
def test_training_never_waits_for_the_device(name: str, precision: torch.dtype) -> None:
    device = torch.device("meta")
    # DeepSpeed too casts weights and floating buffers.
    task, batch = task_of(name).to(device, precision), batch_of(name).to(device)
    task(batch)  # constants are sent once
    with HostWaits() as waits:
        task(batch).backward()
    assert not waits.found
    assert all(p.grad is not None for p in task.parameters())


@pytest.mark.parametrize(
    "send",
    [
        lambda there: torch.tensor([1.0], device=there.device),
        lambda there: there.new_tensor([1.0]),
        lambda there: torch.arange(3).to(there.device),
        lambda there: there[torch.arange(2)],
    ],
)
def test_what_is_sent_is_seen(send: Callable[[Tensor], Tensor]) -> None:
    there = torch.zeros(3, device="meta")
    with HostWaits() as waits:
        send(there)
        there * torch.ones(()) + torch.arange(3, device=there.device)
    assert len(waits.found) == 1


@pytest.fixture
def cuda() -> Iterator[torch.device]:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    yield torch.device("cuda")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TASKS)
def test_a_gpu_computes_the_same_loss_and_nobody_waits_for_it(
    name: str, precision: torch.dtype, cuda: torch.device
) -> None:
    wanted = task_of(name)(batch_of(name)).item()
    batch = batch_of(name).pin_memory()
    assert all(t.is_pinned() for t in (batch.clips, batch.keys, batch.scores, batch.codes))
    task, there = task_of(name).to(cuda, precision), batch.to(cuda)
    found = task(there)
    found.backward()
    task.zero_grad()
    torch.cuda.set_sync_debug_mode("error")
    task(batch.to(cuda)).backward()
    torch.cuda.set_sync_debug_mode("default")
    assert found.item() == pytest.approx(wanted, rel=1e-2 if precision is torch.float32 else 0.1)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in task.parameters())
