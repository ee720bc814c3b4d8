"""Parameter groups: weight decay (matrices only) and learning rate by layer."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

_BLOCK = re.compile(r"\bencoder\.blocks\.(\d+)\.")
_EMBEDDING = re.compile(r"\bencoder\.embed\.")


def parameter_groups(
    model: nn.Module, weight_decay: float, *, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Groups for an optimiser: `name`, `params`, `weight_decay` and `lr_scale`; none is empty.

    Biases, norms and learned queries do not decay, as in VideoMAE's official code. `lr_scale`, by
    which the engine multiplies the learning rate, is layer_decay^(depth + 1 - layer): layer 0 is
    the embedding, layer i the encoder's i-th block, layer depth + 1 the rest (BEiT's layer-wise
    decay).
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    top = 1 + max((layer_of(name, 0) for name, _ in named), default=0)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in named:
        # One rate for all layers needs one group only.
        layer = top if layer_decay == 1 else layer_of(name, top)
        # Matrices decay. A learned query has 1 in all axes but the last.
        decays = parameter.ndim == 2 or parameter.shape[:-1].numel() > 1
        group = groups.setdefault(
            (layer, decays),
            {
                "name": f"layer_{layer}_{'decayed' if decays else 'not_decayed'}",
                "params": [],
                "weight_decay": weight_decay if decays else 0.0,
                "lr_scale": layer_decay ** (top - layer),
            },
        )
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups, key=lambda key: (key[0], not key[1]))]


def layer_of(name: str, top: int) -> int:
    """Layer of a parameter by its name: 0 embeds, i is the i-th block, `top` all the rest."""
    if block := _BLOCK.search(name):
        return int(block.group(1)) + 1
    return 0 if _EMBEDDING.search(name) else top
