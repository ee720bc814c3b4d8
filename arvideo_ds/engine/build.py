"""Model + resolved configuration -> an engine that trains it."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from torch import Tensor, nn

from arvideo_ds.config.schema import OptimSettings
from arvideo_ds.engine.gradient_norm import install_gradient_norm
from arvideo_ds.engine.resolve import (
    ACTIVATION_CHECKPOINTING,
    EVERY,
    SEQUENCE_PARALLEL,
    zero_stage,
)
from arvideo_ds.engine.sequence import SequenceGroup, share_tokens
from arvideo_ds.errors import UserError
from arvideo_ds.optim.optimizers import OPTIMIZERS
from arvideo_ds.optim.trial import refuse, require_sound_optimizer, skip_refused_steps


class Average:
    """average <- decay x average + (1 - decay) x weights, after every applied step.

    `owners` are the tensors that contain this rank's fp32 weights; they change in place.
    """

    def __init__(self, owners: Iterable[Tensor], decay: float) -> None:
        self._decay = decay
        self._averages = {id(owner): (owner, owner.detach().clone()) for owner in owners}

    def of(self, owner: Tensor) -> Tensor:
        """The average of an owner, in its shape."""
        return self._averages[id(owner)][1]

    @torch.no_grad()
    def update(self, refused: Tensor) -> None:
        """refused: 1 where the step was not applied, which leaves the average as it is."""
        for owner, average in self._averages.values():
            share = (1 - self._decay) * (1 - refused.to(average, non_blocking=True))
            average.lerp_(owner.detach().to(average), share)


class Engine:
    """The part of DeepSpeed's engine that training uses."""

    def __init__(
        self, engine: Any, config: dict[str, Any], group: SequenceGroup | None, *, compiled: bool
    ) -> None:
        self.deepspeed = engine
        self.config = config
        self.compiled = compiled
        self.stage = zero_stage(config)
        # Set by fragments.keep_average, and by follow_average: called after each update of it.
        self.average: Average | None = None
        self.spread_average: Callable[[], None] | None = None
        # Start and values of this rank's pieces of the weights that are not trained, by name. In
        # half precision DeepSpeed keeps them nowhere in fp32.
        self.frozen: Mapping[str, tuple[int, Tensor]] = {}
        # Ranks that load the same clips.
        self._group = group
        # At stage 0 DeepSpeed neither measures gradients nor skips a step.
        self._checks_gradients = self.stage == 0
        self._norm = self._refused = torch.zeros(())

    @property
    def module(self) -> nn.Module:
        return self.deepspeed.module

    def forward(self, batch: Any) -> Any:
        return self.deepspeed(batch if self._group is None else self._group.agree(batch))

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients. A loss that is not finite makes them NaN: the step is refused."""
        sound = torch.where(loss.detach().isfinite(), 1.0, torch.nan).to(loss.dtype)
        # DeepSpeed divides by the accumulation steps itself.
        self.deepspeed.backward(loss * sound)

    def step(self) -> None:
        """End a micro-step; the last one of an accumulation updates the weights.

        Gradients that are not finite on any rank change nothing, at every stage and precision.
        """
        updates = self.deepspeed.is_gradient_accumulation_boundary()
        if self._checks_gradients and updates:
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            self._norm = torch.nn.utils.get_total_norm(gradients)
            self._refused = (~self._norm.isfinite()).float()
            refuse(self.deepspeed.optimizer, self._refused)
        self.deepspeed.step()
        if self.average is not None and updates:
            self.average.update(self.refused())
            if self.spread_average is not None:
                self.spread_average()

    def refused(self) -> Tensor:
        """1 if the last step was not applied, else 0; no host sync."""
        if self._checks_gradients:
            return self._refused
        return torch.tensor(float(self.deepspeed.optimizer.overflow), device=self._norm.device)

    def gradient_norm(self) -> float | None:
        """Norm of the last step's gradient before clipping. A host sync."""
        norm = self._norm if self._checks_gradients else self.deepspeed.get_global_grad_norm()
        return None if norm is None else float(norm)

    def compile_seconds(self) -> float:
        """Seconds that the host has spent compiling so far; no host sync."""
        if not self.compiled:
            return 0.0
        return float(torch._dynamo.utils.calculate_time_spent()["total_wall_time"])

    def set_batch(self, micro_batch: int, accumulation: int) -> None:
        """Clips of a micro-step, and micro-steps of a step, from the next step on."""
        engine = self.deepspeed
        engine.set_train_micro_batch_size(micro_batch)
        engine.set_train_batch_size(micro_batch * accumulation * engine.dp_world_size)
        # The CPU's optimiser reads its own; a step ends at multiples of the accumulation.
        if hasattr(engine.optimizer, "gradient_accumulation_steps"):
            engine.optimizer.gradient_accumulation_steps = accumulation
        engine.micro_steps = engine.global_steps * accumulation

    def set_learning_rate(self, lr: float) -> None:
        """Set the schedule's rate, multiplied by the `lr_scale` of each group."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)

    def evaluate(self, batch: Any) -> Any:
        """The module's output in evaluation mode, without gradients. Collective at stage 3."""
        self.deepspeed.eval()
        with torch.no_grad():
            out = self.deepspeed(batch)
        self.deepspeed.train()
        return out


def build_engine(
    model: nn.Module,
    groups: list[dict[str, Any]],
    config: dict[str, Any],
    settings: OptimSettings,
    *,
    compiled: bool = False,
    forms: int = 1,
) -> Engine:
    """Wrap a model. Collective.

    groups: of optim.parameter_groups. compiled, forms: of `compile_model`. Errors: `UserError` for
    an optimiser that breaks a rule of optim/trial.py; `ValueError` for stage 0 in half precision,
    which `resolve` makes stage 1.
    """
    if zero_stage(config) == 0 and (config["bf16"]["enabled"] or config["fp16"]["enabled"]):
        raise ValueError("stage 0 keeps no fp32 weights beside half precision; use stage 1")
    size = config.get(SEQUENCE_PARALLEL, 1)
    group = share_tokens(model, size) if size > 1 else None
    if compiled:
        compile_model(model, layers=ACTIVATION_CHECKPOINTING in config, forms=forms)
    if ACTIVATION_CHECKPOINTING in config:
        config = checkpoint_activations(model, config)
    frozen = _frozen_pieces(model)
    optimizer = _optimizer(groups, config, settings)
    # The schedule sets the rate before every step; nothing may move the weights earlier.
    for parameters in optimizer.param_groups:
        parameters["lr"] = 0.0
    # DeepSpeed's list of tested optimisers is short; optim/trial.py has tested this one.
    config = {"zero_allow_untested_optimizer": True, **config}
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config, dist_init_required=False
    )
    if getattr(engine.optimizer, "optimizer", engine.optimizer) is not optimizer:
        raise UserError(
            f"optim.name={settings.name}: DeepSpeed replaces this optimiser (as it does torch's "
            "Adagrad) by one without parameter groups. Use another optimiser, or "
            "zero_optimization.stage 0 with train.precision=fp32."
        )
    install_gradient_norm(engine.optimizer)
    if zero_stage(config) == 0 and engine.world_size == 1:
        # One rank would reduce all gradients with itself: 18.6 % of a step of ViT-B on a CPU.
        engine.enable_backward_allreduce = False
    built = Engine(engine, config, group, compiled=compiled)
    built.frozen = frozen
    return built


def _frozen_pieces(model: nn.Module) -> dict[str, tuple[int, Tensor]]:
    """Equal pieces over the ranks, in fp32 on the host."""
    rank, size = dist.get_rank(), dist.get_world_size()
    pieces = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            share = -(-parameter.numel() // size)
            piece = parameter.detach().flatten()[rank * share : (rank + 1) * share]
            pieces[name] = (rank * share, piece.to("cpu", torch.float32, copy=True))
    return pieces


def checkpoint_activations(model: nn.Module, config: dict[str, Any]) -> dict[str, Any]:
    """Make transformer layers recompute their activations in the backward pass.

    Parameters keep their names. Returns the configuration without `every`, a key of ours.
    """
    section = dict(config[ACTIVATION_CHECKPOINTING])
    every = section.pop(EVERY, 1)
    config = {**config, ACTIVATION_CHECKPOINTING: section}
    deepspeed.checkpointing.configure(None, deepspeed_config=config)
    for layer in _layers(model, every):
        # Frozen layers keep nothing for the backward pass.
        if any(parameter.requires_grad for parameter in layer.parameters()):
            layer.forward = functools.partial(_checkpointed, layer.forward)
    return config


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile makes kernels for a device: a GPU that Triton knows, a C compiler."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (7, 0)
        and importlib.util.find_spec("triton") is not None
        and any(map(shutil.which, (os.environ.get("CC", ""), "gcc", "clang")))
    )


def compile_model(model: nn.Module, *, layers: bool, forms: int = 1) -> None:
    """torch.compile the methods that the model names in `compilable`, else each layer.

    layers: each layer in any case; DeepSpeed's checkpoint cannot be inside a compiled graph. forms:
    that the model takes in the run (form.py); each is compiled.
    """
    named = () if layers else getattr(model, "compilable", ())
    for name in named:
        owner, _, method = name.rpartition(".")
        _compile(model.get_submodule(owner), method, graphs=forms)
    if not named:
        found = list(_layers(model))
        # Layers share their code. Each may be another graph, for its rate of stochastic depth, and
        # a second one without gradients, for the first pass of a checkpoint.
        for layer in found:
            _compile(layer, "forward", graphs=(2 * len(found) + 8) * forms)


def _compile(module: nn.Module, method: str, *, graphs: int = 1) -> None:
    """Compile a method for training; evaluation has clips of other shapes.

    graphs: the most that the method's code may have in all modules.
    """
    from torch._dynamo.exc import TorchDynamoException  # imported with the compiler: seconds

    plain = getattr(module, method)
    # A graph for the shapes of training, with the random numbers of the uncompiled model.
    fast = torch.compile(plain, dynamic=False, fullgraph=True, options={"fallback_random": True})

    @functools.wraps(plain)
    def run(*arguments: Any, **named: Any) -> Any:
        if not module.training:
            return plain(*arguments, **named)
        # Settings belong to a thread, and a checkpoint recomputes in one of autograd's.
        limits = torch.compiler.config
        if limits.recompile_limit < graphs:
            limits.recompile_limit = graphs
            limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, graphs)
        try:
            return fast(*arguments, **named)
        except TorchDynamoException as error:
            why = str(error).strip().partition("\n")[0]
            raise UserError(
                f"torch.compile cannot compile {type(module).__name__}.{method} ({why}). Set "
                "train.compile=false."
            ) from error

    setattr(module, method, run)


def _layers(model: nn.Module, every: int = 1) -> Iterator[nn.Module]:
    """Every k-th module in each list named `blocks` or `layers`."""
    for name, layers in model.named_modules():
        if isinstance(layers, nn.ModuleList) and name.rpartition(".")[2] in ("blocks", "layers"):
            yield from list(layers)[::every]


def _checkpointed(forward: Any, hidden: Tensor, *arguments: Any, **named: Any) -> Any:
    if torch.is_grad_enabled() and not hidden.requires_grad:
        # After frozen weights. Else autograd would not see that the layer has trained ones.
        hidden = hidden.detach().requires_grad_()
    # DeepSpeed's checkpoint takes positional arguments only.
    run = functools.partial(forward, **named)
    return deepspeed.checkpointing.checkpoint(run, hidden, *arguments)


def _optimizer(
    groups: list[dict[str, Any]], config: dict[str, Any], settings: OptimSettings
) -> torch.optim.Optimizer:
    offloads = config.get("zero_optimization", {}).get("offload_optimizer")
    if settings.implementation == "deepspeed":
        if offloads:
            return DeepSpeedCPUAdam(groups, betas=settings.betas, adamw_mode=True)
        if torch.cuda.is_available():
            return FusedAdam(groups, betas=settings.betas, adam_w_mode=True)
        raise UserError(
            "optim.implementation=deepspeed is FusedAdam here, which needs a GPU. Use torch, or "
            "offload the optimiser (ds_configs/zero3_offload.json) for DeepSpeed's CPUAdam."
        )
    build = OPTIMIZERS.choose(settings.name, key="optim.name")
    device = torch.device("cpu" if offloads else get_accelerator().current_device_name())
    require_sound_optimizer(
        settings.name,
        lambda trial: build(trial, settings),
        device,
        flattened=zero_stage(config) > 0,
    )
    optimizer = build(groups, settings)
    if zero_stage(config) == 0:  # else DeepSpeed skips such steps
        skip_refused_steps(optimizer)
    return optimizer
