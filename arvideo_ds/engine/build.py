"""Model + resolved configuration -> a DeepSpeed engine."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from torch import nn

from arvideo_ds.engine.average import Average
from arvideo_ds.engine.resolve import (
    ACTIVATION_CHECKPOINTING,
    EVERY,
    SEQUENCE_PARALLEL,
    zero_stage,
)
from arvideo_ds.engine.sequence import SequenceGroup, share_tokens
from arvideo_ds.errors import UserError


class Engine:
    """A thin seam over DeepSpeed's engine: what the loop needs and nothing else."""

    def __init__(
        self, engine: Any, config: dict[str, Any], group: SequenceGroup | None = None
    ) -> None:
        self.deepspeed = engine
        self.config = config
        # The ranks that load the same clips, where several do.
        self._group = group
        self.stage = zero_stage(config)
        # Without ZeRO and half precision DeepSpeed measures no gradient and applies any.
        halved = config["bf16"]["enabled"] or config["fp16"]["enabled"]
        self._guards_itself = self.stage == 0 and not halved
        self._norm = torch.zeros(())
        # Set by fragments.keep_average.
        self.average: Average | None = None

    @property
    def module(self) -> nn.Module:
        return self.deepspeed.module

    def forward(self, batch: Any) -> Any:
        return self.deepspeed(batch if self._group is None else self._group.agree(batch))

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
        updates = self.deepspeed.is_gradient_accumulation_boundary()
        if self._guards_itself and updates:
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            self._norm = torch.nn.utils.get_total_norm(gradients)
            # torch's fused AdamW obeys this on the device, so the host need not know.
            self.deepspeed.optimizer.found_inf = (~self._norm.isfinite()).float()
        self.deepspeed.step()
        if self.average is not None and updates:
            self.average.update(self.refused())

    def refused(self) -> torch.Tensor:
        """1 if the last step was not applied, else 0; no host sync."""
        if self._guards_itself:
            return self.deepspeed.optimizer.found_inf
        return torch.tensor(float(self.deepspeed.optimizer.overflow), device=self._norm.device)

    def set_learning_rate(self, lr: float) -> None:
        """The schedule's rate; each group takes its `lr_scale` of it."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)

    def evaluate(self, batch: Any) -> Any:
        """What the module returns in evaluation mode, without gradients.

        Collective at stage 3, where the weights are gathered layer by layer.
        """
        self.deepspeed.eval()
        with torch.no_grad():
            out = self.deepspeed(batch)
        self.deepspeed.train()
        return out

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
    implementation: str = "torch",
    compiled: bool = False,
) -> Engine:
    """Wrap a model; every rank calls it.

    groups: as of optim.parameter_groups. implementation: whose AdamW, "torch" or "deepspeed".
    compiled: torch.compile each transformer layer.
    """
    size = config.get(SEQUENCE_PARALLEL, 1)
    group = share_tokens(model, size) if size > 1 else None
    if compiled:
        _wrap_layers(model, 1, lambda forward: torch.compile(forward, dynamic=False))
    if ACTIVATION_CHECKPOINTING in config:
        config = checkpoint_activations(model, config)
    # The schedule sets the rate before every step; until then nothing may move the weights.
    optimizer = _adamw(implementation, config)(groups, lr=0.0, betas=betas)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config, dist_init_required=False
    )
    # At stage 0 in half precision DeepSpeed (0.19.8) steps once on zero gradients to make Adam's
    # state, and Adam has counted that step: its first real update would be another one.
    optimizer.state.clear()
    if zero_stage(config) == 0 and engine.world_size == 1:
        # Alone, a rank would flatten all gradients into one tensor, reduce it with itself and copy
        # it back: 18.6 % of a step of ViT-B on a CPU (docs/performance.md).
        engine.enable_backward_allreduce = False
    return Engine(engine, config, group)


def checkpoint_activations(model: nn.Module, config: dict[str, Any]) -> dict[str, Any]:
    """Make transformer layers recompute their inside in the backward pass.

    Applied from outside, so model files know nothing of it; the JSON's section configures it.
    Names of parameters stay. Returns the configuration without the key that is ours (`every`).
    """
    section = dict(config[ACTIVATION_CHECKPOINTING])
    every = section.pop(EVERY, 1)
    config = {**config, ACTIVATION_CHECKPOINTING: section}
    deepspeed.checkpointing.configure(None, deepspeed_config=config)
    _wrap_layers(model, every, lambda forward: functools.partial(_checkpointed, forward))
    return config


def _wrap_layers(model: nn.Module, every: int, wrap: Callable[[Any], Any]) -> None:
    """Replace the forward of every k-th module in each list named `blocks` or `layers`."""
    for name, layers in model.named_modules():
        if isinstance(layers, nn.ModuleList) and name.rpartition(".")[2] in ("blocks", "layers"):
            for layer in list(layers)[::every]:
                layer.forward = wrap(layer.forward)


def _checkpointed(forward: Any, *arguments: Any, **named: Any) -> Any:
    # DeepSpeed's checkpoint takes positional arguments alone.
    return deepspeed.checkpointing.checkpoint(functools.partial(forward, **named), *arguments)


def _adamw(implementation: str, config: dict[str, Any]) -> Callable[..., torch.optim.Optimizer]:
    if implementation == "torch":
        return functools.partial(torch.optim.AdamW, fused=True)
    if config.get("zero_optimization", {}).get("offload_optimizer"):
        return functools.partial(DeepSpeedCPUAdam, adamw_mode=True)
    if not torch.cuda.is_available():
        raise UserError(
            "optim.implementation=deepspeed is FusedAdam here, which needs a GPU. Use torch, or "
            "offload the optimiser (ds_configs/zero3_offload.json) for DeepSpeed's CPUAdam."
        )
    return functools.partial(FusedAdam, adam_w_mode=True)
