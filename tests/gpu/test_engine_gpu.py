"""The engine on one GPU: every ZeRO stage and precision, with real kernels.

test_check.py runs the same tests on a CPU (ENGINE_TESTS_ON=cpu), and starts them on the imaginary
GPU of tests/fakecuda, where values mean nothing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor

from arvideo_ds.data.loader import Batch
from arvideo_ds.engine.build import Engine, build_engine
from arvideo_ds.engine.checkpoints import load_checkpoint, newest_checkpoint, save_checkpoint
from arvideo_ds.engine.resolve import resolve
from arvideo_ds.engine.world import World, start_world
from arvideo_ds.optim.groups import parameter_groups
from arvideo_ds.planning.plan import make_plan
from arvideo_ds.tasks.pretrain import Pretrain
from tests.engine import gradient_norm, matrix

ON_CPU = os.environ.get("ENGINE_TESTS_ON") == "cpu"
STEPS = 12
STAGES = pytest.mark.parametrize("stage", [0, 1, 2, 3])
PRECISIONS = pytest.mark.parametrize("precision", ["fp32", "bf16"])
# The same loss of the same weights, computed in another order.
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (ON_CPU or torch.cuda.is_available()), reason="no CUDA GPU"),
]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """One rank on the GPU. Other tests of this process find the environment as it was."""
    with mock.patch.dict(os.environ):
        started = start_world()
        assert started.device.type == ("cpu" if ON_CPU else "cuda")
        yield started
        dist.destroy_process_group()


@pytest.fixture(autouse=True)
def _whole_numbers() -> Iterator[None]:
    """Matrix products in fp32 of all their digits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def build(stage: int, precision: str, *, compiled: bool = False) -> Engine:
    recipe = matrix.RECIPE.model_copy(deep=True)
    recipe = recipe.model_copy(
        update={"train": recipe.train.model_copy(update={"precision": precision})}
    )
    plan = make_plan(recipe, world_size=1, num_videos=matrix.BATCH)
    config = resolve({"zero_optimization": {"stage": stage}}, recipe, plan, "test")
    torch.manual_seed(0)
    task = Pretrain(recipe)
    groups = parameter_groups(task, 0.05)
    engine = build_engine(task, groups, config, recipe.optim, compiled=compiled)
    engine.set_learning_rate(1e-3)
    return engine


def clips(step: int, world: World) -> Batch:
    (batch,) = matrix.batches(step, 1, world)
    assert batch.clips.device == world.device
    return batch


def step(engine: Engine, number: int, world: World, factor: float = 1.0) -> float:
    """One update; its loss before."""
    loss = engine.forward(clips(number, world))
    engine.backward(loss * factor)
    engine.step()
    return float(loss.detach())


def weights(engine: Engine) -> list[Tensor]:
    plain = list(engine.module.parameters())
    full = [safe_get_full_fp32_param(p) for p in plain]
    return [
        (p if f is None else f).detach().cpu().clone() for f, p in zip(full, plain, strict=True)
    ]


@STAGES
@PRECISIONS
def test_losses_fall(stage: int, precision: str, world: World) -> None:
    engine = build(stage, precision)
    # In half precision stage 0 keeps no fp32 weights.
    assert engine.stage == (1 if (stage, precision) == (0, "bf16") else stage)
    losses = [step(engine, number, world) for number in range(STEPS)]
    assert all(p.device.type == world.device.type for p in engine.module.parameters())
    assert all(map(math.isfinite, losses))
    assert sum(losses[-3:]) < 0.97 * sum(losses[:3])


@STAGES
@PRECISIONS
def test_a_nan_changes_no_weight(stage: int, precision: str, world: World) -> None:
    engine = build(stage, precision)
    step(engine, 0, world)
    before = weights(engine)
    step(engine, 1, world, factor=math.nan)
    assert float(engine.refused()) == 1
    for old, new in zip(before, weights(engine), strict=True):
        assert torch.equal(old, new)
    assert math.isfinite(step(engine, 2, world))
    assert float(engine.refused()) == 0
    pairs = zip(before, weights(engine), strict=True)
    assert not all(torch.equal(old, new) for old, new in pairs)


@pytest.mark.parametrize(
    ("saved", "loaded", "precision"),
    [(0, 2, "fp32"), (1, 3, "fp32"), (3, 0, "fp32"), (2, 3, "bf16"), (3, 1, "bf16")],
)
def test_another_stage_continues_with_the_same_losses(
    saved: int, loaded: int, precision: str, world: World, tmp_path: Path
) -> None:
    first, second = build(saved, precision), build(loaded, precision)
    for number in range(3):
        step(first, number, world)
    save_checkpoint(first, tmp_path, 3, {}, keep=1)
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    load_checkpoint(second, checkpoint)
    for number in (3, 4):  # of the same weights, then of the same moments
        expected = step(first, number, world)
        assert step(second, number, world) == pytest.approx(expected, rel=TOLERANCE[precision])


@PRECISIONS
def test_compiled_is_as_eager(precision: str, world: World) -> None:
    eager, compiled = (build(1, precision, compiled=compiled) for compiled in (False, True))
    for number in range(3):
        expected = step(eager, number, world)
        assert step(compiled, number, world) == pytest.approx(expected, rel=TOLERANCE[precision])


@STAGES
@PRECISIONS
def test_norms_and_refusals_are_deepspeeds(stage: int, precision: str, world: World) -> None:
    if (stage, precision) == (0, "bf16"):
        pytest.skip("runs as stage 1")
    cases = gradient_norm.compare(stage, precision, world)
    ours, theirs = cases.pop("")
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert all(refused == [math.inf, math.inf] for refused in cases.values())
