"""A frozen model that a run learns from, and the divergence from its class scores."""

from __future__ import annotations

from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

AnyModel = TypeVar("AnyModel", bound=nn.Module)


class Teacher(Generic[AnyModel]):
    """A model in evaluation mode, without gradients: an encoder, or a classifier.

    Not an `nn.Module`: a module that has a teacher has none of its weights, so neither the
    optimiser, ZeRO's partitions, checkpoints nor exports have them. report: what was loaded.
    """

    def __init__(self, model: AnyModel, dtype: torch.dtype, report: str) -> None:
        self.model = model.to(dtype).requires_grad_(False).eval()
        self.report = report

    def move_to(self, device: torch.device) -> None:
        if next(self.model.parameters()).device != device:
            self.model.to(device)


def divergence(scores: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of softmax(scores / t) from softmax(taught / t), times t^2; B.

    scores, taught: logits B x classes of student and teacher. The factor keeps the size of the
    gradient. Source: Hinton et al. (arXiv 1503.02531, section 2); DeiT's soft distillation
    (arXiv 2012.12877, section 4, and losses.py, which also divides by the number of classes).
    """
    ours, theirs = (F.log_softmax(s / temperature, dim=1) for s in (scores, taught))
    return temperature**2 * F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1)
