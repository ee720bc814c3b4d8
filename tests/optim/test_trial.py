"""Optimisers that would break the guard, a checkpoint or a ZeRO stage are refused at the start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from arvideo_ds.config.load import load_recipe
from arvideo_ds.config.schema import OptimSettings
from arvideo_ds.errors import UserError
from arvideo_ds.optim.optimizers import OPTIMIZERS
from arvideo_ds.optim.trial import refuse, require_sound_optimizer, skip_refused_steps


class Momentum(Optimizer):
    """A sound one; each subclass breaks one rule."""

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, {"lr": 0.1, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                self.update(weight, group)

    def update(self, weight: Any, group: dict[str, Any]) -> None:
        state = self.state[weight]
        moment = state.setdefault("moment", torch.zeros_like(weight))
        moment.lerp_(weight.grad, 0.1)
        weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * moment)


class PretendsToObey(Momentum):
    _step_supports_amp_scaling = True


class CountsOutside(Momentum):
    steps = 0

    def update(self, weight: Any, group: dict[str, Any]) -> None:
        self.steps += 1
        super().update(weight, {**group, "lr": group["lr"] / self.steps})


class StateAtConstruction(Momentum):
    def __init__(self, groups: Any) -> None:
        super().__init__(groups)
        for group in self.param_groups:
            for weight in group["params"]:
                self.state[weight]["moment"] = torch.zeros_like(weight)

    def update(self, weight: Any, group: dict[str, Any]) -> None:
        self.state[weight]["moment"].add_(weight.grad)
        weight.sub_(group["lr"] * self.state[weight]["moment"])


class DecaysAtRateZero(Momentum):
    def update(self, weight: Any, group: dict[str, Any]) -> None:
        super().update(weight, group)
        weight.mul_(0.9)


class SmallState(Momentum):
    def update(self, weight: Any, group: dict[str, Any]) -> None:
        norm = self.state[weight].setdefault("norm", torch.zeros(()))
        norm.add_(weight.grad.square().sum())
        weight.sub_(group["lr"] * weight.grad / norm.sqrt().clamp(min=1e-8))


class CountsInInt(Momentum):
    def update(self, weight: Any, group: dict[str, Any]) -> None:
        self.state[weight]["step"] = self.state[weight].get("step", 0) + 1
        rate = group["lr"] / (1 - 0.9 ** self.state[weight]["step"])
        super().update(weight, {**group, "lr": rate})


class WholeMatrix(Momentum):
    def update(self, weight: Any, group: dict[str, Any]) -> None:
        gradient = weight.grad
        weight.sub_(group["lr"] * gradient / gradient.norm().clamp(min=1e-8))


class Random(Momentum):
    def update(self, weight: Any, group: dict[str, Any]) -> None:
        weight.sub_(group["lr"] * weight.grad * torch.rand_like(weight))


class NeedsClosure(Momentum):
    def step(self, closure: Any) -> None:  # type: ignore[override]
        closure()


def tried(
    build: Callable[[Any], Optimizer], *, flattened: bool = True, device: str = "cpu"
) -> None:
    require_sound_optimizer("mine", build, torch.device(device), flattened=flattened)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_projects_optimisers_are_sound(name: str, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    tried(lambda groups: OPTIMIZERS[name](groups, OptimSettings()), device=device)


SOUND: dict[str, Callable[[Any], Optimizer]] = {
    "momentum": Momentum,
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "adam": lambda groups: torch.optim.Adam(groups, foreach=True),
}


@pytest.mark.parametrize("name", SOUND)
def test_other_sound_optimisers_pass(name: str) -> None:
    tried(SOUND[name])


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (PretendsToObey, "found_inf = 1 changed weights"),
        (CountsOutside, "Keep all state in self.state"),
        (StateAtConstruction, "KeyError"),
        (DecaysAtRateZero, "multiply weight decay by the learning rate"),
        (SmallState, "does not continue from a checkpoint"),
        (CountsInInt, "'step' as a tensor"),
        (WholeMatrix, "needs whole weight matrices"),
        (Random, "different weights each time"),
        (NeedsClosure, "closure"),
        (torch.optim.Adafactor, "cannot train here"),
    ],
)
def test_an_optimiser_that_breaks_a_rule_is_refused_with_the_rule(kind: Any, words: str) -> None:
    with pytest.raises(UserError, match=r"optim\.name=mine cannot train here") as raised:
        tried(kind)
    assert words in str(raised.value)


def test_whole_matrices_are_given_at_stage_0_in_fp32() -> None:
    tried(WholeMatrix, flattened=False)


@pytest.mark.parametrize(
    "kind", [Momentum, torch.optim.AdamW, lambda p: torch.optim.AdamW(p, fused=True)]
)
def test_a_refused_step_changes_nothing_whether_or_not_the_optimiser_knows_found_inf(
    kind: Callable[[Any], Any],
) -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = kind([weight])
    skip_refused_steps(optimizer)
    weight.grad = torch.tensor([1.0, torch.nan, torch.inf])
    refuse(optimizer, torch.ones(()))
    optimizer.step()
    assert torch.equal(weight, torch.ones(3))
    weight.grad = torch.ones(3)
    refuse(optimizer, torch.zeros(()))
    optimizer.step()
    assert (weight < 1).all()


def test_an_unknown_optimiser_and_deepspeeds_implementation_of_another_are_refused() -> None:
    with pytest.raises(UserError, match=r"optim\.name=adamv is not a known optimizer.*'adamw'"):
        OPTIMIZERS.check("adamv", key="optim.name")
    with pytest.raises(UserError, match=r"optim\.implementation=deepspeed is DeepSpeed's AdamW"):
        load_recipe("demo", ["optim.name=mine", "optim.implementation=deepspeed"])


def test_another_optimiser_keeps_the_recipes_other_settings() -> None:
    plain, other = load_recipe("demo"), load_recipe("demo", ["optim.name=mine"])
    assert other.optim == plain.optim.model_copy(update={"name": "mine"})
