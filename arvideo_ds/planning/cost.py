"""What a forward pass costs, from the recipe alone: parameters and floating-point operations.

Matrix products are counted as 2 x m x n x k, attention over all pairs (a mask saves nothing in
a dense kernel); elementwise work is not counted, as PyTorch's FlopCounterMode does. A test holds
these formulas against the real modules.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from arvideo_ds.config import EncoderRecipe, Recipe, TokenizerRecipe
from arvideo_ds.config.sizes import DECODER_MLP_RATIO, DecoderShape
from arvideo_ds.planning.tokenizer_cost import convolutions


@dataclass(frozen=True)
class Cost:
    parameters_encoder: int
    parameters_decoder: int
    flops_forward_per_clip: int


@functools.singledispatch
def cost_of(recipe: Recipe) -> Cost:
    """Cost of a recipe's model on a clip of training; a linear head is too small to count.

    A recipe of another kind of model registers its own function (`cost_of.register`).
    """
    raise NotImplementedError(f"the cost of {type(recipe).__name__} is not known")


@cost_of.register
def _(recipe: EncoderRecipe) -> Cost:
    decoder = recipe.transformer.decoder
    encoder_weights, flops = _encoder_and_pooling(recipe), encoder_flops(recipe)
    if recipe.transformer.class_attention:
        flops += class_attention_flops(recipe)
    if decoder is None:
        return Cost(sum(encoder_weights), 0, flops)
    decoder_weights = sum(_decoder_sizes(recipe, decoder))
    return Cost(sum(encoder_weights), decoder_weights, flops + _decoder_flops(recipe, decoder))


@cost_of.register
def _(recipe: TokenizerRecipe) -> Cost:
    encoding, decoding = convolutions(recipe.tokenizer, recipe.geometry)
    return Cost(
        sum(convolution.parameters for convolution in encoding),
        sum(convolution.parameters for convolution in decoding),
        sum(convolution.flops for convolution in (*encoding, *decoding)),
    )


def _decoder_flops(recipe: EncoderRecipe, decoder: DecoderShape) -> int:
    """FLOP of the decoder on one clip, forward."""
    width, counts = decoder.width, recipe.counts
    rows = counts.decoded
    layer = _mlp(rows, width, DECODER_MLP_RATIO * width)
    if decoder.crosses:
        layer += _attention(rows, counts.encoded, width)
    if decoder.self_attention:
        layer += _attention(rows, rows, width)
    return (
        _linear(counts.encoded, recipe.size.width, width)
        + decoder.depth * layer
        + _linear(counts.predicted, width, recipe.transformer.outputs)
    )


def encoder_flops(recipe: EncoderRecipe) -> int:
    """FLOP of the encoder on one clip's encoded tokens, forward."""
    size, tokens = recipe.size, recipe.counts.encoded
    return _linear(tokens, recipe.geometry.cube_values, size.width) + size.depth * (
        _attention(tokens, tokens, size.width) + _mlp(tokens, size.width, size.mlp)
    )


def class_attention_flops(recipe: EncoderRecipe) -> int:
    """FLOP of one query that reads a clip's encoded tokens, forward."""
    size = recipe.size
    read = _attention(1, recipe.counts.encoded, size.width)
    return read + _mlp(1, size.width, size.mlp)


def class_attention_sizes(recipe: EncoderRecipe) -> list[int]:
    """Elements of every weight and bias of that layer, and of its learnt query."""
    width = recipe.size.width
    attention = [weight for n in (1, 2, 1) for weight in _weights(width, n * width)]
    return [width, *attention, *_mlp_sizes(width, recipe.size.mlp)]


def encoder_sizes(recipe: EncoderRecipe) -> list[int]:
    """Elements of every weight and bias of the encoder."""
    size = recipe.size
    block = _self_attention(size.width) + _mlp_sizes(size.width, size.mlp)
    embed = _weights(recipe.geometry.cube_values, size.width)
    return [*embed, *(size.depth * block), *_norm(size.width)]


def parameter_sizes(recipe: EncoderRecipe) -> tuple[list[int], list[int]]:
    """Elements of every weight and bias: of the encoder's with its pooling, and of what follows.

    That is the decoder or the linear head, which is empty where the number of classes is not known
    yet.
    """
    model = recipe.transformer
    if model.decoder is not None:
        rest = _decoder_sizes(recipe, model.decoder)
    else:
        rest = _weights(model.size.width, model.outputs) if model.outputs else []
    return _encoder_and_pooling(recipe), rest


def _encoder_and_pooling(recipe: EncoderRecipe) -> list[int]:
    pooling = class_attention_sizes(recipe) if recipe.transformer.class_attention else []
    return [*encoder_sizes(recipe), *pooling]


def _decoder_sizes(recipe: EncoderRecipe, decoder: DecoderShape) -> list[int]:
    width = decoder.width
    layer = _mlp_sizes(width, DECODER_MLP_RATIO * width)
    if decoder.crosses:
        layer += _cross_attention(width)
    if decoder.self_attention:
        layer += _self_attention(width)
    # VideoMAE's projection has no bias; each has one vector that is learnt for the hidden tokens.
    inputs = recipe.size.width
    projection = _weights(inputs, width) if decoder.crosses else [inputs * width]
    outputs = _weights(width, recipe.transformer.outputs)
    return [*projection, width, *(decoder.depth * layer), *_norm(width), *outputs]


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
