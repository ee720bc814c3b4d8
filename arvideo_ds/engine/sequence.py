"""Sequence parallelism (DeepSpeed-Ulysses): S ranks encode the same clips, each 1/S of the tokens.

Only attention mixes tokens. Each rank embeds and processes a slice of them; for attention the ranks
exchange tokens for heads (all-to-all), and back. After the encoder the slices are gathered: every
rank of a group computes decoder and loss of all tokens.

DeepSpeed takes the mean over all W ranks. The true gradient is the mean of dL, the gradient of a
group's loss, over W / S groups. Both agree if the gradients of a group's ranks add up to S dL:

    (1)  for a tensor that all ranks of a group have, their gradients add up to S times the true one
    (2)  for a tensor that one rank has, its gradient is S times the true one

The loss has (1): S ranks, a gradient of 1 each. Equal computations on all ranks keep (1), being
linear in the gradient. The backward of the gathering sums the gradients and takes this rank's slice
(reduce-scatter): (1) becomes (2). Attention's exchange moves values of (2), and gradients back. The
backward of slicing turns (2) into (1): zeros elsewhere. A weight that is applied to slices gets the
sum of (2) over the ranks' tokens.

Source: DeepSpeed-Ulysses (Jacobs et al. 2023, arXiv 2309.14509).

B clips, M tokens, m = ceil(M / S) of a rank, h heads, d values of a head, D = h d.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.sequence.layer import DistributedAttention
from torch import Tensor, nn
from torch.nn import functional as F

from arvideo_ds.errors import UserError


class SequenceGroup:
    """S consecutive ranks, among them this one, that encode the same clips. Collective."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.process_group, _ = dist.new_subgroups(size)
        self.rank = dist.get_rank(self.process_group)

    def slice(self, tokens: Tensor) -> Tensor:
        """This rank's part of tokens B M ...: B m ..., the last parts padded with zeros."""
        share = -(-tokens.shape[1] // self.size)
        part = tokens[:, self.rank * share : (self.rank + 1) * share]
        padding = tokens.new_zeros(len(tokens), share - part.shape[1], *tokens.shape[2:])
        return torch.cat([part, padding], dim=1)

    def gather(self, part: Tensor, count: int) -> Tensor:
        """All ranks' parts B m D, joined to B M D; count: M."""
        gathered: Tensor = _Gather.apply(part, self)
        return gathered.flatten(1, 2)[:, :count]

    def agree(self, batch: Any) -> Any:
        """The batch with only those clips valid that decoded on all ranks."""
        valid = batch.valid.int()
        dist.all_reduce(valid, dist.ReduceOp.MIN, group=self.process_group)
        return dataclasses.replace(batch, valid=valid.bool())


class _Gather(torch.autograd.Function):
    """B m D of each rank -> B S m D on all; backward adds up and scatters."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: SequenceGroup) -> Tensor:
        ctx.group = group
        parts = part.new_empty(group.size * len(part), *part.shape[1:])
        dist.all_gather_into_tensor(parts, part.contiguous(), group=group.process_group)
        return parts.unflatten(0, (group.size, -1)).transpose(0, 1).contiguous()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        parts = gradients[0].transpose(0, 1).flatten(0, 1).contiguous()
        part = parts.new_empty(len(gradients[0]), *parts.shape[1:])
        dist.reduce_scatter_tensor(part, parts, group=ctx.group.process_group)
        return part, None


def share_tokens(model: nn.Module, size: int) -> SequenceGroup:
    """Split the tokens of every encoder in the model over groups of `size` ranks. Collective.

    Parameters keep their names. Only in training mode: in evaluation mode each rank encodes its
    own clips whole, without communication. Errors: `UserError` where there is no encoder.
    """
    encoders: list[Any] = [module for module in model.modules() if _encodes(module)]
    if not encoders:
        raise UserError(
            f"sequence_parallel_size={size} in the DeepSpeed JSON splits the tokens of an encoder, "
            "and this task has none. Remove the key."
        )
    group = SequenceGroup(size)
    for encoder in encoders:
        tokens = _Tokens(group)
        encoder.forward = functools.partial(_encode, encoder, encoder.forward, tokens)
        for block in encoder.blocks:
            attention = block.attn
            attention.forward = functools.partial(_attend, attention, attention.forward, tokens)
    return group


def _encodes(module: nn.Module) -> bool:
    blocks = getattr(module, "blocks", None)
    return isinstance(blocks, nn.ModuleList) and all(hasattr(block, "attn") for block in blocks)


class _Tokens:
    """What an encoder's layers share: the group, and the number of all tokens `count` (M)."""

    def __init__(self, group: SequenceGroup) -> None:
        self.group = group
        self.count = 0
        self.attend = DistributedAttention(
            self._attend_all, group.process_group, scatter_idx=2, gather_idx=1
        )

    def _attend_all(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of all tokens in this rank's heads, B S m h/S d; padding is excluded."""
        padding = q.shape[1] - self.count
        q, k, v = (x[:, : self.count].transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
        return F.pad(out, (0, 0, 0, 0, 0, padding))


def _encode(
    encoder: nn.Module,
    forward: Callable[..., Tensor],
    shared: _Tokens,
    cubes: Tensor,
    tokens: Tensor,
    mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """`Encoder.forward` on a slice of the tokens, gathered."""
    if not encoder.training:
        return forward(cubes, tokens, mask, **options)
    shared.count, group = tokens.shape[1], shared.group
    part = forward(group.slice(cubes), group.slice(tokens), mask, **options)
    return group.gather(part, shared.count)


def _attend(
    attention: Any,
    forward: Callable[..., Tensor],
    shared: _Tokens,
    x: Tensor,
    attn_mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """timm's `Attention.forward` on a slice of the tokens, B m D; attn_mask: M M, of all tokens."""
    if not attention.training:
        return forward(x, attn_mask=attn_mask, **options)
    q, k, v = attention.qkv(x).unflatten(2, (3, attention.num_heads, -1)).unbind(2)
    return attention.proj(shared.attend(q, k, v, 0, None, attn_mask).flatten(2))
