"""Model + resolved configuration -> a DeepSpeed engine."""

from __future__ import annotations

import functools
from typing import Any

import deepspeed
import torch
from torch import nn

from arvideo_ds.engine.resolve import ACTIVATION_CHECKPOINTING, zero_stage


class Engine:
    """A thin seam over DeepSpeed's engine: what the loop needs and nothing else."""

    def __init__(self, engine: Any, config: dict[str, Any]) -> None:
        self.deepspeed = engine
        self.config = config
        self.stage = zero_stage(config)
        # Without ZeRO and half precision DeepSpeed measures no gradient and applies any.
        halved = config["bf16"]["enabled"] or config["fp16"]["enabled"]
        self._guards_itself = self.stage == 0 and not halved
        self._norm = torch.zeros(())

    @property
    def module(self) -> nn.Module:
        return self.deepspeed.module

    def forward(self, batch: Any) -> Any:
        return self.deepspeed(batch)

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients of a loss; one that is not finite makes them so, and the step is refused."""
        sound = torch.where(loss.detach().isfinite(), 1.0, torch.nan).to(loss.dtype)
        # DeepSpeed divides by the accumulation steps itself.
        self.deepspeed.backward(loss * sound)

    def step(self) -> None:
        """Count a micro-step; the last one of an accumulation updates the weights.

        Gradients that are not finite on any rank leave weights and optimiser as they are, for
        every stage and precision.
        """
        if self._guards_itself and self.deepspeed.is_gradient_accumulation_boundary():
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            self._norm = torch.nn.utils.get_total_norm(gradients)
            # torch's fused AdamW obeys this on the device, so the host need not know.
            self.deepspeed.optimizer.found_inf = (~self._norm.isfinite()).float()
        self.deepspeed.step()

    def refused(self) -> torch.Tensor:
        """1 if the last step was not applied, else 0; no host sync."""
        if self._guards_itself:
            return self.deepspeed.optimizer.found_inf
        return torch.tensor(float(self.deepspeed.optimizer.overflow), device=self._norm.device)

    def set_learning_rate(self, lr: float) -> None:
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr

    def gradient_norm(self) -> float | None:
        """Norm of the last step's gradient before clipping. A host sync."""
        norm = self._norm if self._guards_itself else self.deepspeed.get_global_grad_norm()
        return None if norm is None else float(norm)


def build_engine(
    model: nn.Module,
    groups: list[dict[str, Any]],
    config: dict[str, Any],
    *,
    betas: tuple[float, float],
) -> Engine:
    """Wrap a model; every rank calls it. `groups` as of optim.parameter_groups.

    The optimiser is torch's fused AdamW: it needs no compiler at first use.
    """
    if ACTIVATION_CHECKPOINTING in config:
        checkpoint_activations(model, config)
    # The schedule sets the rate before every step; until then nothing may move the weights.
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config, dist_init_required=False
    )
    # At stage 0 in half precision DeepSpeed (0.19.8) steps once on zero gradients to make Adam's
    # state, and Adam has counted that step: its first real update would be another one.
    optimizer.state.clear()
    return Engine(engine, config)


def checkpoint_activations(model: nn.Module, config: dict[str, Any]) -> None:
    """Make every transformer layer recompute its inside in the backward pass.

    Applied from outside, so model files know nothing of it: each module in a list named `blocks`
    or `layers` gets a forward that goes through DeepSpeed's checkpointing, which the JSON's
    section configures (partitioning, CPU offload). Names of parameters stay.
    """
    deepspeed.checkpointing.configure(None, deepspeed_config=config)
    for name, layers in model.named_modules():
        if isinstance(layers, nn.ModuleList) and name.rpartition(".")[2] in ("blocks", "layers"):
            for layer in layers:
                layer.forward = functools.partial(_checkpointed, layer.forward)


def _checkpointed(forward: Any, *arguments: Any, **named: Any) -> Any:
    # DeepSpeed's checkpoint takes positional arguments alone.
    return deepspeed.checkpointing.checkpoint(functools.partial(forward, **named), *arguments)
