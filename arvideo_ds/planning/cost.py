"""What a forward pass costs, from the recipe alone: parameters and floating-point operations.

Matrix products count 2 x m x n x k, attention counts all pairs (a mask saves nothing in a dense
kernel), elementwise operations nothing, as in PyTorch's FlopCounterMode. A test compares these
formulas with the real modules.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from arvideo_ds.config import EncoderRecipe, Recipe, TokenizerRecipe
from arvideo_ds.config.sizes import (
    DECODER_MLP_RATIO,
    PROBE_MLP_RATIO,
    DecoderShape,
    Size,
    Transformer,
)
from arvideo_ds.config.tokenizer import halvings, scorer_kernel, scorer_strides
from arvideo_ds.geometry import CHANNELS

# Positions of a 3 x 3 x 3 kernel.
_CUBE = 27


@dataclass(frozen=True)
class Cost:
    parameters_encoder: int
    parameters_decoder: int
    flops_forward_per_clip: int
    flops_teacher_per_clip: int = 0
    # None: all.
    parameters_trained: int | None = None


@functools.singledispatch
def cost_of(recipe: Recipe) -> Cost:
    """Cost of a recipe's model on a training clip; a linear head is too small to count.

    A recipe of another kind of model registers its own function (`cost_of.register`).
    """
    raise NotImplementedError(f"the cost of {type(recipe).__name__} is not known")


@cost_of.register
def _(recipe: EncoderRecipe) -> Cost:
    model, flops = recipe.transformer, encoder_flops(recipe)
    if model.class_attention:
        width = model.size.width
        flops += _attention(1, recipe.counts.encoded, width) + 2 * _linear(1, width, model.size.mlp)
    flops += probe_flops(recipe)
    encoder, decoder = parameter_sizes(recipe)
    if model.decoder is None:
        trained = sum(trained_sizes(recipe)) if model.frozen else None
        predicted = recipe.counts.predicted
        flops += _linear(predicted, model.size.width, model.outputs)
        head = sum(decoder) if predicted else 0
        return Cost(sum(encoder), head, flops, _teacher_flops(recipe), trained)
    return Cost(
        sum(encoder),
        sum(decoder),
        flops + _decoder_flops(recipe, model.decoder),
        _teacher_flops(recipe),
    )


@cost_of.register
def _(recipe: TokenizerRecipe) -> Cost:
    encoder, decoder = _tokenizer(recipe)
    encoder_size, decoder_size = (sum(size for size, _ in part) for part in (encoder, decoder))
    return Cost(encoder_size, decoder_size, sum(flops for _, flops in encoder + decoder))


def encoder_flops(recipe: EncoderRecipe) -> int:
    """FLOP of the encoder on one clip's encoded tokens, forward."""
    return _vit_flops(recipe.size, recipe.counts.encoded, recipe.geometry.cube_values)


def probe_flops(recipe: Recipe) -> int:
    """FLOP of all heads' attentive pooling on one clip's tokens, forward; 0 without it."""
    model = recipe.transformer
    if model is None or not model.attentive:
        return 0
    width, sequence = model.size.width, model.together * recipe.counts.encoded
    mlp = PROBE_MLP_RATIO * width
    block = _attention(sequence, sequence, width) + 2 * _linear(sequence, width, mlp)
    # The query's attention has no output projection.
    query = _attention(1, sequence, width) - _linear(1, width, width) + 2 * _linear(1, width, mlp)
    return model.heads * ((model.attentive - 1) * block + query) // model.together


def _teacher_flops(recipe: EncoderRecipe) -> int:
    """FLOP of a teacher on the tokens of one clip that it sees, forward; 0 without one."""
    teacher = recipe.transformer.teacher
    if teacher is None:
        return 0
    return _vit_flops(teacher.size, teacher_tokens(recipe), teacher.geometry.cube_values)


def teacher_tokens(recipe: EncoderRecipe) -> int:
    """Tokens of one clip that a teacher sees: all, or those that the student encodes."""
    teacher = recipe.transformer.teacher
    if teacher is None:
        return 0
    return recipe.counts.encoded if teacher.aligned else teacher.geometry.num_tokens


def _vit_flops(size: Size, tokens: int, cube_values: int) -> int:
    return _linear(tokens, cube_values, size.width) + size.depth * (
        _attention(tokens, tokens, size.width) + 2 * _linear(tokens, size.width, size.mlp)
    )


def _decoder_flops(recipe: EncoderRecipe, decoder: DecoderShape) -> int:
    width, counts = decoder.width, recipe.counts
    rows = counts.decoded
    layer = 2 * _linear(rows, width, DECODER_MLP_RATIO * width)
    if decoder.crosses:
        layer += _attention(rows, counts.encoded, width)
    if decoder.self_attention:
        layer += _attention(rows, rows, width)
    return (
        _linear(counts.encoded, recipe.size.width, width)
        + decoder.depth * layer
        + _linear(counts.predicted, width, recipe.transformer.outputs)
    )


def parameter_sizes(recipe: EncoderRecipe) -> tuple[list[int], list[int]]:
    """Elements of every weight and bias: of the encoder with its pooling; of the decoder or head.

    The head is empty while the number of classes is not known.
    """
    model, size = recipe.transformer, recipe.size
    encoder = encoder_sizes(size, recipe.geometry.cube_values)
    if model.class_attention:  # without a norm of the queries, with a learnt query
        attention = _cross_attention_sizes(size.width)
        encoder += [size.width, *attention, *_mlp_sizes(size.width, size.mlp)]
    if model.attentive:
        encoder += model.heads * _probe_sizes(size.width, model.attentive)
    encoder += size.depth * _adapter_sizes(model)
    if model.decoder is not None:
        return encoder, _decoder_sizes(recipe, model.decoder)
    head = _linear_sizes(size.width, model.outputs) if model.outputs else []
    return encoder, model.heads * head


def encoder_sizes(size: Size, cube_values: int) -> list[int]:
    """Elements of every weight and bias of a ViT."""
    block = [*_attention_sizes(size.width), *_mlp_sizes(size.width, size.mlp)]
    embed = _linear_sizes(cube_values, size.width)
    return [*embed, *(size.depth * block), size.width, size.width]


def trained_sizes(recipe: EncoderRecipe) -> list[int]:
    """Elements of every weight and bias that is trained: has a gradient and optimiser states."""
    encoder, decoder = parameter_sizes(recipe)
    model = recipe.transformer
    if not model.frozen:
        return encoder + decoder
    # Without a pooling that attends the last norm is the classifier's.
    count = len(encoder_sizes(recipe.size, recipe.geometry.cube_values))
    return encoder[count if model.class_attention or model.attentive else count - 2 :] + decoder


def forward_passes(recipe: Recipe) -> float:
    """Cost of forward and backward in forward passes.

    The backward pass costs one for the gradients of activations, and one for those of weights; of a
    frozen encoder's heads, only an attentive pooling counts.
    """
    model = recipe.transformer
    if model is None or not model.frozen:
        return 3
    if model.lora_rank:
        return 2
    return 1 + 2 * probe_flops(recipe) / cost_of(recipe).flops_forward_per_clip


def _adapter_sizes(model: Transformer) -> list[int]:
    """Of a block's adapters: each has two matrices."""
    width, mlp = model.size.width, model.size.mlp
    layers = [(width, 3 * width), (width, width)] if model.lora_rank else []
    layers += [(width, mlp), (mlp, width)] if model.lora_rank and model.lora_mlp else []
    return [model.lora_rank * size for layer in layers for size in layer]


def _decoder_sizes(recipe: EncoderRecipe, decoder: DecoderShape) -> list[int]:
    width, inputs = decoder.width, recipe.size.width
    layer = _mlp_sizes(width, DECODER_MLP_RATIO * width)
    if decoder.crosses:
        layer += [width, width, *_cross_attention_sizes(width)]
    if decoder.self_attention:
        layer += _attention_sizes(width)
    # VideoMAE's projection has no bias; both have one learnt vector for the hidden tokens.
    projection = _linear_sizes(inputs, width) if decoder.crosses else [inputs * width]
    outputs = _linear_sizes(width, recipe.transformer.outputs)
    return [*projection, width, *(decoder.depth * layer), width, width, *outputs]


def _linear(rows: int, inputs: int, outputs: int) -> int:
    return 2 * rows * inputs * outputs


def _attention(queries: int, keys: int, width: int) -> int:
    projections = 2 * _linear(queries, width, width) + 2 * _linear(keys, width, width)
    return projections + 2 * _linear(queries, width, keys)


def _linear_sizes(inputs: int, outputs: int) -> list[int]:
    return [inputs * outputs, outputs]


def _attention_sizes(width: int) -> list[int]:
    """A norm first, as in `_mlp_sizes`."""
    return [width, width, *_linear_sizes(width, 3 * width), *_linear_sizes(width, width)]


def _cross_attention_sizes(width: int) -> list[int]:
    """Queries, keys and values, output."""
    return [size for n in (1, 2, 1) for size in _linear_sizes(width, n * width)]


def _probe_sizes(width: int, depth: int) -> list[int]:
    """Of one attentive pooling: its blocks, and a query that attends without output projection."""
    mlp = _mlp_sizes(width, PROBE_MLP_RATIO * width)
    query = [width, width, width, *_linear_sizes(width, width), *_linear_sizes(width, 2 * width)]
    return [*(depth - 1) * [*_attention_sizes(width), *mlp], *query, *mlp]


def _mlp_sizes(width: int, hidden: int) -> list[int]:
    return [width, width, *_linear_sizes(width, hidden), *_linear_sizes(hidden, width)]


def _convolution(
    kernel: int, inputs: int, outputs: int, voxels: int, *, normed: bool = False
) -> tuple[int, int]:
    """Parameters, FLOP. kernel: its positions; voxels: of the output; normed: by a group norm."""
    parameters = (kernel * inputs + 1) * outputs + (2 * inputs if normed else 0)
    return parameters, 2 * voxels * kernel * inputs * outputs


def _tokenizer(recipe: TokenizerRecipe) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Convolutions of encoder and scorer, and of the decoder."""
    settings, sizes = recipe.tokenizer, [math.prod(recipe.clip)]
    for stride in halvings(recipe.patch):
        sizes.append(sizes[-1] // math.prod(stride))
    # Channels and voxels at each resolution, the clip's first.
    widths = [settings.filters * multiplier for multiplier in settings.multipliers]
    levels = list(zip(widths, sizes, strict=True))

    before, latent, size = widths[0], len(settings.levels), sizes[-1]
    encoder = [_convolution(_CUBE, CHANNELS, before, sizes[0])]
    for width, voxels in [*levels, levels[-1]]:
        encoder += _residuals([before, *settings.blocks * [width]], voxels)
        before = width
    encoder.append(_convolution(1, before, latent, size, normed=True))

    inputs, voxels = CHANNELS, sizes[0]
    for stride in scorer_strides(recipe.patch):
        voxels //= math.prod(stride)
        kernel = math.prod(scorer_kernel(stride))
        encoder.append(_convolution(kernel, inputs, settings.filters, voxels))
        inputs = settings.filters

    decoder = [_convolution(_CUBE, latent, before, size)]
    decoder += _residuals([before, *settings.blocks * [before]], size)
    for level, (width, voxels) in reversed(list(enumerate(levels))):
        decoder += _residuals([before, *settings.blocks * [width]], voxels)
        if level:
            decoder.append(_convolution(_CUBE, width, width, sizes[level - 1]))
        before = width
    decoder.append(_convolution(_CUBE, before, CHANNELS, sizes[0], normed=True))
    return encoder, decoder


def _residuals(widths: list[int], voxels: int) -> Iterator[tuple[int, int]]:
    for inputs, outputs in itertools.pairwise(widths):
        yield _convolution(_CUBE, inputs, outputs, voxels, normed=True)
        yield _convolution(_CUBE, outputs, outputs, voxels, normed=True)
        if inputs != outputs:
            yield _convolution(1, inputs, outputs, voxels)
