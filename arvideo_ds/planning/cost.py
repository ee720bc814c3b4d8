"""What a forward pass costs, from the recipe alone: parameters and floating-point operations.

Matrix products are counted as 2 x m x n x k, attention over all pairs (a mask saves nothing in
a dense kernel); elementwise work is left out, as PyTorch's FlopCounterMode does. A test holds
these formulas against the real modules.
"""

from __future__ import annotations

from dataclasses import dataclass

from arvideo_ds.config.schema import (
    DetectRecipe,
    FinetuneRecipe,
    PretrainRecipe,
    Recipe,
    TokenizerRecipe,
)
from arvideo_ds.config.sizes import DECODER_MLP_RATIO
from arvideo_ds.planning.tokenizer_cost import convolutions


@dataclass(frozen=True)
class Cost:
    parameters_encoder: int
    parameters_decoder: int
    flops_forward_per_clip: int


def cost_of(recipe: Recipe) -> Cost:
    """Cost of a recipe's model on a clip of training; a linear head is too small to count."""
    if isinstance(recipe, TokenizerRecipe):
        encoding, decoding = convolutions(recipe.tokenizer, recipe.geometry)
        return Cost(
            sum(convolution.parameters for convolution in encoding),
            sum(convolution.parameters for convolution in decoding),
            sum(convolution.flops for convolution in (*encoding, *decoding)),
        )
    if not isinstance(recipe, PretrainRecipe):
        parameters, flops = sum(encoder_sizes(recipe)), encoder_flops(recipe)
        if recipe.pooling == "attention":
            parameters += sum(class_attention_sizes(recipe))
            flops += class_attention_flops(recipe)
        return Cost(parameters, 0, flops)
    encoder, decoder = parameter_sizes(recipe)
    return Cost(sum(encoder), sum(decoder), encoder_flops(recipe) + decoder_flops(recipe))


def decoder_flops(recipe: PretrainRecipe) -> int:
    """FLOP of the decoder on one clip, forward."""
    shape, counts = recipe.decoder_shape, recipe.counts
    width, rows = shape.width, counts.decoded
    layer = _mlp(rows, width, DECODER_MLP_RATIO * width)
    if shape.crosses:
        layer += _attention(rows, counts.encoded, width)
    if shape.self_attention:
        layer += _attention(rows, rows, width)
    return (
        _linear(counts.encoded, recipe.size.width, width)
        + shape.depth * layer
        + _linear(counts.predicted, width, recipe.target_values)
    )


def encoder_flops(recipe: Recipe) -> int:
    """FLOP of the encoder on one clip's encoded tokens, forward."""
    size, tokens = recipe.size, recipe.counts.encoded
    return _linear(tokens, recipe.geometry.cube_values, size.width) + size.depth * (
        _attention(tokens, tokens, size.width) + _mlp(tokens, size.width, size.mlp)
    )


def class_attention_flops(recipe: Recipe) -> int:
    """FLOP of one query that reads a clip's encoded tokens, forward."""
    size = recipe.size
    read = _attention(1, recipe.counts.encoded, size.width)
    return read + _mlp(1, size.width, size.mlp)


def class_attention_sizes(recipe: Recipe) -> list[int]:
    """Elements of every weight and bias of that layer, and of its learnt query."""
    width = recipe.size.width
    attention = [weight for n in (1, 2, 1) for weight in _weights(width, n * width)]
    return [width, *attention, *_mlp_sizes(width, recipe.size.mlp)]


def encoder_sizes(recipe: Recipe) -> list[int]:
    """Elements of every weight and bias of the encoder."""
    size = recipe.size
    block = _self_attention(size.width) + _mlp_sizes(size.width, size.mlp)
    embed = _weights(recipe.geometry.cube_values, size.width)
    return [*embed, *(size.depth * block), *_norm(size.width)]


def parameter_sizes(recipe: Recipe) -> tuple[list[int], list[int]]:
    """Elements of every weight and bias: of the encoder's and of the decoder's.

    Of a classifier or detector: of the encoder's with its pooling, and of the linear head's, which
    is empty where the number of classes is not known yet.
    """
    if not isinstance(recipe, PretrainRecipe):
        return _with_pooling(recipe), _head(recipe)
    size, values, shape = recipe.size, recipe.target_values, recipe.decoder_shape
    width = shape.width
    layer = _mlp_sizes(width, DECODER_MLP_RATIO * width)
    if shape.crosses:
        layer += _cross_attention(width)
    if shape.self_attention:
        layer += _self_attention(width)
    # VideoMAE's projection has no bias; each has one vector that is learnt for the hidden tokens.
    projection = _weights(size.width, width) if shape.crosses else [size.width * width]
    learnt = width
    decoder = [*projection, learnt, *(shape.depth * layer), *_norm(width), *_weights(width, values)]
    return encoder_sizes(recipe), decoder


def _with_pooling(recipe: Recipe) -> list[int]:
    pooling = class_attention_sizes(recipe) if recipe.pooling == "attention" else []
    return [*encoder_sizes(recipe), *pooling]


def _head(recipe: Recipe) -> list[int]:
    classes = None
    if isinstance(recipe, FinetuneRecipe):
        classes = recipe.finetune.num_classes
    elif isinstance(recipe, DetectRecipe):
        classes = recipe.detect.num_actions
    return [] if classes is None else _weights(recipe.size.width, classes)


def _linear(rows: int, inputs: int, outputs: int) -> int:
    return 2 * rows * inputs * outputs


def _attention(queries: int, keys: int, width: int) -> int:
    projections = 2 * _linear(queries, width, width) + 2 * _linear(keys, width, width)
    return projections + 2 * _linear(queries, width, keys)


def _mlp(rows: int, width: int, hidden: int) -> int:
    return 2 * _linear(rows, width, hidden)


def _weights(inputs: int, outputs: int) -> list[int]:
    return [inputs * outputs, outputs]


def _norm(width: int) -> list[int]:
    return [width, width]


def _self_attention(width: int) -> list[int]:
    return [*_norm(width), *_weights(width, 3 * width), *_weights(width, width)]


def _cross_attention(width: int) -> list[int]:
    queries, keys_values, project = (_weights(width, n * width) for n in (1, 2, 1))
    return [*_norm(width), *queries, *keys_values, *project]


def _mlp_sizes(width: int, hidden: int) -> list[int]:
    return [*_norm(width), *_weights(width, hidden), *_weights(hidden, width)]
