"""What a forward pass costs, from the recipe alone: parameters and floating-point operations.

Matrix products are counted as 2 x m x n x k, attention over all pairs (a mask saves nothing in
a dense kernel); elementwise work is left out, as PyTorch's FlopCounterMode does. A test holds
these formulas against the real modules.
"""

from __future__ import annotations

from dataclasses import dataclass

from arvideo_ds.config.schema import Recipe
from arvideo_ds.config.sizes import DECODER_MLP_RATIO


@dataclass(frozen=True)
class Cost:
    parameters_encoder: int
    parameters_decoder: int
    flops_forward_per_clip: int


def arvideo_cost(recipe: Recipe) -> Cost:
    """Cost of ARVideo: parameters, and FLOP of one forward pass of one clip."""
    size, values = recipe.size, recipe.geometry.cube_values
    width, depth, _ = recipe.decoder_shape
    tokens, queries = recipe.encoder_tokens, recipe.decoder_queries
    self_attention = recipe.decoder.self_attention

    encoder_flops = _linear(tokens, values, size.width) + size.depth * (
        _attention(tokens, tokens, size.width) + _mlp(tokens, size.width, size.mlp)
    )
    layer_flops = _attention(queries, tokens, width) + _mlp(
        queries, width, DECODER_MLP_RATIO * width
    )
    if self_attention:
        layer_flops += _attention(queries, queries, width)
    decoder_flops = (
        _linear(tokens, size.width, width) + depth * layer_flops + _linear(queries, width, values)
    )
    return Cost(
        parameters_encoder=_encoder_parameters(size.width, size.depth, size.mlp, values),
        parameters_decoder=_decoder_parameters(
            size.width, width, depth, values, self_attention=self_attention
        ),
        flops_forward_per_clip=encoder_flops + decoder_flops,
    )


def _linear(rows: int, inputs: int, outputs: int) -> int:
    return 2 * rows * inputs * outputs


def _attention(queries: int, keys: int, width: int) -> int:
    projections = 2 * _linear(queries, width, width) + 2 * _linear(keys, width, width)
    return projections + 2 * _linear(queries, width, keys)


def _mlp(rows: int, width: int, hidden: int) -> int:
    return 2 * _linear(rows, width, hidden)


def _weights(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _block_parameters(width: int, hidden: int, attentions: int) -> int:
    norms = 2 * width * (attentions + 1)
    attention = _weights(width, 3 * width) + _weights(width, width)
    mlp = _weights(width, hidden) + _weights(hidden, width)
    return norms + attentions * attention + mlp


def _encoder_parameters(width: int, depth: int, hidden: int, values: int) -> int:
    final_norm = 2 * width
    return _weights(values, width) + depth * _block_parameters(width, hidden, 1) + final_norm


def _decoder_parameters(
    encoder_width: int, width: int, depth: int, values: int, *, self_attention: bool
) -> int:
    memory = _weights(encoder_width, width)
    query, final_norm, head = width, 2 * width, _weights(width, values)
    hidden = DECODER_MLP_RATIO * width
    layers = depth * _block_parameters(width, hidden, 2 if self_attention else 1)
    return memory + query + layers + final_norm + head
