"""Compiled models: one graph for the whole model or one for each layer, and the same numbers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from arvideo_ds.config import FinetuneRecipe
from arvideo_ds.engine import build
from arvideo_ds.engine.build import compile_model
from arvideo_ds.engine.form import Form
from arvideo_ds.errors import UserError
from arvideo_ds.models.encoder import Encoder
from arvideo_ds.tasks.finetune import Finetune
from arvideo_ds.tasks.pretrain import Pretrain
from tests.engine.test_form import batch_of as clips_of
from tests.engine.test_form import forms_of
from tests.tasks.test_detect import batch_of as boxes_of
from tests.tasks.test_detect import task  # noqa: F401
from tests.tasks.test_devices import batch_of, recipe_of, task_of


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounter]:
    """Counts the graphs that torch.compile traces, and runs them uncompiled."""
    torch.compiler.reset()
    counter, trace = CompileCounter(), torch.compile
    settings = {"dynamic": False, "fullgraph": True}

    def count(function: Callable[..., Any], **given: Any) -> Callable[..., Any]:
        assert {key: given[key] for key in settings} == settings
        return trace(function, backend=counter, **settings)

    monkeypatch.setattr(build.torch, "compile", count)
    with torch.compiler.config.patch(recompile_limit=8):
        yield counter
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["arvideo", "lvmae", "finetune"])
def test_a_task_is_one_graph_for_all_steps(name: str, graphs: CompileCounter) -> None:
    module, batch = task_of(name), batch_of(name)
    expected = copy.deepcopy(module)(batch)
    compile_model(module, layers=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = module(batch)
    torch.testing.assert_close(found, expected)
    module.eval()(batch)
    module.train()(
        batch.__class__(
            batch.clips,
            batch.keys + 9,
            batch.labels,
            batch.valid,
            scores=batch.scores,
            codes=batch.codes,
        )
    )
    assert graphs.frame_count == 1


def test_each_form_of_a_model_is_one_graph(graphs: CompileCounter) -> None:
    small, large = forms_of("arvideo")
    module = Pretrain(small)
    compile_model(module, layers=False, forms=2)
    module(clips_of(16))
    Form(Pretrain(large)).give_to(module)
    uncompiled = Pretrain(large)
    uncompiled.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(clips_of(32)), uncompiled(clips_of(32)))
    module(clips_of(32))
    assert graphs.frame_count == 2


def test_detection_compiles_what_does_not_depend_on_the_number_of_boxes(
    task: nn.Module,  # noqa: F811
    graphs: CompileCounter,
) -> None:
    expected = copy.deepcopy(task)(boxes_of([1, 2]))
    compile_model(task, layers=False)
    torch.testing.assert_close(task(boxes_of([1, 2])), expected)
    task(boxes_of([3, 4]))
    assert graphs.frame_count == 1


def test_every_layer_is_compiled_however_many_rates_of_stochastic_depth_there_are(
    graphs: CompileCounter,
) -> None:
    """At torch's limit of 8 graphs (two a layer with recomputation) the rest ran uncompiled."""
    depth, width = 5, 8
    encoder = Encoder(
        positions=torch.zeros(4, width),
        cube_values=3,
        depth=depth,
        heads=1,
        mlp=width,
        drop_path=0.1,
    )
    compile_model(encoder, layers=True)
    cubes, tokens = torch.rand(2, 4, 3), torch.arange(4).expand(2, 4)
    for _ in range(2):
        with torch.no_grad():  # a checkpoint's first pass
            encoder(cubes, tokens)
        # Its second pass, on a GPU in a thread of autograd's.
        with ThreadPoolExecutor() as other:
            other.submit(lambda: encoder(cubes, tokens).sum().backward()).result()
        assert graphs.frame_count == 2 * depth


def test_a_model_that_cannot_be_compiled_is_an_error_that_names_the_setting() -> None:
    class Printing(nn.Module):
        compilable = ("loss",)

        def loss(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return 2 * x

    module = Printing()
    compile_model(module, layers=False)
    with pytest.raises(UserError, match=r"Printing\.loss .* Set train\.compile=false"):
        module.loss(torch.ones(2))
    assert module.eval().loss(torch.ones(2)).sum() == 4


@pytest.mark.slow
def test_compiled_and_eager_give_the_same_loss_and_gradients() -> None:
    """Of fine-tuning, with draws: stochastic depth and dropout. ARVideo's curve: test_training."""
    tree = recipe_of("finetune").model_dump()
    tree["finetune"] |= {"drop_path": 0.2, "head_dropout": 0.2}
    torch.manual_seed(0)
    module: nn.Module = Finetune(FinetuneRecipe.model_validate(tree), 3)
    for part in module.modules():  # compiling more of the same layers takes minutes
        if isinstance(part, nn.ModuleList):
            del part[2:]
    compiled = copy.deepcopy(module)
    compile_model(compiled, layers=False)
    losses = [each(batch_of("finetune")) for each in (module, compiled)]
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=1e-5)
    for loss in losses:
        loss.backward()
    for eager, fast in zip(module.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(fast.grad, eager.grad, rtol=0, atol=1e-5)
