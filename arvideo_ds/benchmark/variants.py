"""The step as the paper's code makes it, so that the cost of each habit can be seen."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from arvideo_ds.benchmark.rows import PAPER
from arvideo_ds.geometry import Triple
from arvideo_ds.models.cubes import pick, to_cubes
from arvideo_ds.models.objective import Objective


def attention_of(variant: str) -> contextlib.AbstractContextManager[None]:
    """Entered around a forward pass: which kernels its attention may take."""
    # "Math" is scores, softmax and mixing one after another, each written to memory.
    return sdpa_kernel(SDPBackend.MATH) if variant == PAPER else contextlib.nullcontext()


def embed_all_tokens(objective: Objective, patch: Triple) -> None:
    """Make the encoder embed every token of the clip, and pick the encoded ones afterwards.

    The same numbers at a higher price. Source: the official codes of VideoMAE and ARVideo, whose
    patch embedding is a convolution over the whole clip.
    """
    encoder = objective.encoder
    embed, seen = encoder.embed_cubes, list[Tensor]()

    def remember(_module: Any, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])

    def embed_all(_picked: Tensor, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        cubes = to_cubes(seen.pop(), patch)
        places = torch.arange(cubes.shape[1], device=cubes.device).expand(cubes.shape[:2])
        return pick(embed(cubes, places, positions), tokens)

    objective.register_forward_pre_hook(remember)
    encoder.embed_cubes = embed_all  # type: ignore[method-assign, assignment]
