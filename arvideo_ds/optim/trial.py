"""Rules for optimisers, checked on a small weight before a run starts.

A step whose gradient is not finite changes nothing, a checkpoint continues bit for bit, and every
ZeRO stage gives the same curve.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from arvideo_ds.errors import UserError
from arvideo_ds.optim.state import make_state, moments, steps_applied

Build = Callable[[list[dict[str, Any]]], Any]


def skip_refused_steps(optimizer: Any) -> None:
    """Make the optimiser obey `refuse`."""
    if not _obeys_found_inf(optimizer):
        step = optimizer.step
        optimizer.step = lambda *given: None if optimizer.refused.item() else step(*given)


def refuse(optimizer: Any, refused: Tensor) -> None:
    """Make the next step change neither weights nor state if `refused` is 1 (else 0).

    As in torch.amp.GradScaler, optimisers with `_step_supports_amp_scaling`, such as torch's fused
    ones, read the number on the device; for all others the host waits for it.
    """
    setattr(optimizer, "found_inf" if _obeys_found_inf(optimizer) else "refused", refused)


def _obeys_found_inf(optimizer: Any) -> bool:
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def require_sound_optimizer(
    name: str, build: Build, device: torch.device, *, flattened: bool
) -> None:
    """Check the rules. flattened: whether the run gives the optimiser pieces of weights.

    Errors: `UserError` that states the broken rule.
    """
    try:
        wrong = _broken_rule(build, device, flattened=flattened)
    except UserError:
        raise
    except Exception as error:  # whatever a plugin raises
        wrong = f"a step failed ({type(error).__name__}: {error})."
    if wrong is not None:
        raise UserError(f"optim.name={name} cannot train here: {wrong}")


class _Trial:
    """A new optimiser of one weight, or of pieces of it."""

    def __init__(self, build: Build, pieces: Sequence[Tensor]) -> None:
        self._build = build
        self._weights = [nn.Parameter(piece.clone()) for piece in pieces]
        self._optimizer = build([{"params": self._weights, "weight_decay": 0.05}])
        skip_refused_steps(self._optimizer)

    def steps(self, *numbers: float, rate: float = 1e-2) -> _Trial:
        """Steps whose gradients are functions of the numbers; those of infinity are refused."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        device, sizes = self._weights[0].device, [weight.numel() for weight in self._weights]
        for number in numbers:
            refuse(self._optimizer, torch.tensor(float(math.isinf(number)), device=device))
            gradient = (torch.arange(float(sum(sizes)), device=device) * number).sin() * number
            for weight, piece in zip(self._weights, gradient.split(sizes), strict=True):
                weight.grad = piece.view_as(weight)
            self._optimizer.step()
        return self

    def started(self) -> _Trial:
        """Make all state by a step that must change no weight, and forget it."""
        self.steps(0, rate=0.0)
        self._optimizer.state.clear()
        return self

    def resumed(self) -> _Trial:
        """Continue in another optimiser with what a checkpoint saves."""
        other = _Trial(self._build, [weight.detach() for weight in self._weights])
        for old, new in zip(self._weights, other._weights, strict=True):
            saved = moments(self._optimizer, old)
            make_state(other._optimizer, [new], saved, steps_applied(self._optimizer))
            other._optimizer.state[new].update(saved)
        return other

    def weights(self) -> Tensor:
        return torch.cat([weight.detach().flatten() for weight in self._weights])


_RULES: dict[str, Callable[[_Trial], _Trial]] = {
    "the same steps give different weights each time. Compute a step from weights, gradients and "
    "state alone.": lambda trial: trial.steps(1, 2, 3),
    "a step with self.found_inf = 1 changed weights or state. Obey found_inf, or do not define "
    "_step_supports_amp_scaling: such steps are then skipped.": lambda trial: trial.steps(
        math.inf, 1, math.inf, 2, 3
    ),
    "a step of zero gradients at learning rate 0 and then `state.clear()` change its first step. "
    "Keep all state in self.state, create it in step(), and multiply "
    "weight decay by the learning rate.": lambda trial: trial.started().steps(1, 2, 3),
    "it does not continue from a checkpoint, which has those tensors of self.state[weight] that "
    "are as large as the weight, and 'step' as a tensor. Keep no other state.": lambda trial: (
        trial.steps(1, 2).resumed().steps(3)
    ),
}


def _broken_rule(build: Build, device: torch.device, *, flattened: bool) -> str | None:
    weight = torch.linspace(-1, 1, 12, device=device)
    expected = _Trial(build, [weight.view(3, 4)]).steps(1, 2, 3).weights()
    for rule, path in _RULES.items():
        if not torch.equal(path(_Trial(build, [weight.view(3, 4)])).weights(), expected):
            return rule
    in_pieces = _Trial(build, weight.split([5, 7])).steps(1, 2, 3).weights()
    if not flattened or torch.allclose(in_pieces, expected, rtol=1e-5):
        return None
    return (
        "it needs whole weight matrices, but ZeRO and half precision give it pieces of flattened "
        "weights. Use zero_optimization.stage 0 with train.precision=fp32, or an optimiser that "
        "works value by value."
    )
