"""Memory of a training step, from the recipe alone: model states under ZeRO, and activations.

Model states follow the allocations of DeepSpeed 0.19, which differ from the ZeRO paper's table and
from DeepSpeed's estimators; tests measure them on live tensors (docs/planning.md). All numbers are
bytes of one rank. Activations are counted tensor by tensor, as autograd keeps them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from arvideo_ds.config import EncoderRecipe
from arvideo_ds.config.sizes import DECODER_MLP_RATIO, DecoderShape
from arvideo_ds.planning.cost import parameter_sizes

FP32 = 4
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# AdamW under ZeRO or half precision: a master copy and two moments in fp32.
_ADAMW = 3 * FP32
# Plain data parallel flattens so many gradients into one all-reduce.
_ALL_REDUCE_ELEMENTS = 500_000_000
# Mean and deviation of a token, and its row of the softmax in each head, stay in fp32.
_NORM_STATISTICS, _SOFTMAX_ROW = 2 * FP32, FP32
# Bytes of the loss' temporaries per predicted value: its pixel, and in fp32 the prediction and the
# statistics that normalise the target.
_LOSS_TEMPORARIES = 1 + 3 * FP32
# Fields of `Strategy` that are sizes, by their keys in the section zero_optimization.
_SIZES = {
    "reduce_bucket": "reduce_bucket_size",
    "prefetch_bucket": "stage3_prefetch_bucket_size",
    "persistence_threshold": "stage3_param_persistence_threshold",
    "max_live": "stage3_max_live_parameters",
    "max_reuse_distance": "stage3_max_reuse_distance",
    "sub_group": "sub_group_size",
}


@dataclass(frozen=True)
class Strategy:
    """The settings of a DeepSpeed JSON that decide memory and communication, with its defaults.

    `recompute` = k: every k-th transformer layer is recomputed in the backward pass; 0 none.
    `sequence_parallel` = S: groups of S ranks share the encoder's tokens of their clips.
    Sizes of buckets and thresholds count elements.
    """

    stage: int = 0
    recompute: int = 0
    sequence_parallel: int = 1
    offload_optimizer: bool = False
    offload_parameters: bool = False
    overlap_comm: bool = False
    reduce_bucket: int = 500_000_000
    prefetch_bucket: int = 50_000_000
    persistence_threshold: int = 100_000
    max_live: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000
    sub_group: int = 1_000_000_000

    @property
    def offloads(self) -> bool:
        return self.offload_optimizer or self.offload_parameters

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Strategy:
        """Read DeepSpeed's configuration: a JSON file's tree, or the resolved dict."""
        zero = tree.get("zero_optimization", {})
        stage = int(zero.get("stage", 0))
        overlap = zero.get("overlap_comm")
        recomputation = tree.get("activation_checkpointing")
        return cls(
            stage=stage,
            recompute=0 if recomputation is None else int(recomputation.get("every", 1)),
            sequence_parallel=int(tree.get("sequence_parallel_size", 1)),
            offload_optimizer=_offloads(zero, "offload_optimizer"),
            offload_parameters=_offloads(zero, "offload_param"),
            overlap_comm=stage == 3 if overlap is None else bool(overlap),
            **{name: int(zero[key]) for name, key in _SIZES.items() if zero.get(key) is not None},
        )


def _offloads(zero: Mapping[str, Any], key: str) -> bool:
    return (zero.get(key) or {}).get("device", "none") != "none"


@dataclass(frozen=True, kw_only=True)
class ModelStates:
    """Bytes of one rank's GPU, and of the host memory that offloading takes.

    parameters   the weights that forward and backward use (ZeRO-3: this rank's part)
    optimizer    fp32 master weights, where there is a second copy, and AdamW's moments
    gradients    at the end of the backward pass
    held         gradients that accumulation keeps through a forward pass
    gathered     ZeRO-3: weights of other ranks kept until their backward pass
    bucket       communication buffer while the backward pass runs
    bucket_copy  flat copy of gradients that a collective makes
    update       gradients in fp32 and temporaries while AdamW runs
    cast         ZeRO: flat gradients in half precision, while they become fp32 before AdamW
    """

    parameters: int
    optimizer: int
    gradients: int
    held: int
    gathered: int = 0
    bucket: int = 0
    bucket_copy: int
    update: int
    cast: int = 0
    host: int = 0

    @property
    def rest(self) -> int:
        """Bytes between steps."""
        return self.parameters + self.optimizer


def model_states(
    recipe: EncoderRecipe, strategy: Strategy, *, world_size: int, accumulation: int = 1
) -> ModelStates:
    """Bytes of parameters, gradients and optimiser; ranks differ by less than a weight's part."""
    encoder, decoder = parameter_sizes(recipe)
    sizes, element = encoder + decoder, _element(recipe)
    if strategy.stage == 0:
        return _data_parallel(sum(sizes), world_size, accumulation)
    if strategy.stage == 3:
        return _zero_3(sizes, element, strategy, world_size)
    return _zero_1_2(sum(sizes), element, strategy, world_size, accumulation)


def _data_parallel(total: int, world_size: int, accumulation: int) -> ModelStates:
    """fp32: AdamW updates the weights that the model uses. Half precision has no stage 0."""
    reduced = 0 if world_size == 1 else min(total, _ALL_REDUCE_ELEMENTS)
    return ModelStates(
        parameters=FP32 * total,
        optimizer=(_ADAMW - FP32) * total,
        gradients=FP32 * total,
        held=FP32 * total if accumulation > 1 else 0,
        bucket_copy=FP32 * reduced,
        update=FP32 * total,
    )


def _zero_1_2(
    total: int, element: int, strategy: Strategy, world_size: int, accumulation: int
) -> ModelStates:
    """A flat buffer of all weights, and a partition of master weights, also in fp32.

    Stage 1 keeps all gradients until the end of the last backward pass, stage 2 its part. AdamW's
    fp32 copy of gradients is additional.
    """
    part = math.ceil(total / world_size)
    here = 0 if strategy.offload_optimizer else 1
    accumulates = 1 if accumulation > 1 else 0
    return ModelStates(
        parameters=element * total,
        optimizer=here * _ADAMW * part,
        gradients=here * element * part,
        held=accumulates * here * element * (total if strategy.stage == 1 else part),
        bucket=element * (2 if strategy.overlap_comm else 1) * strategy.reduce_bucket,
        bucket_copy=element * min(strategy.reduce_bucket, total),
        update=here * (element + FP32) * part,
        cast=0 if element == FP32 else here * element * part,
        host=(1 - here) * (_ADAMW + FP32 + element + accumulates * element) * part,
    )


def _zero_3(sizes: list[int], element: int, strategy: Strategy, world_size: int) -> ModelStates:
    """Each weight is split among the ranks; small ones are kept whole in addition."""
    total, part = sum(sizes), sum(math.ceil(size / world_size) for size in sizes)
    # A single rank has everything on its GPU and copies nothing.
    copies = 0 if world_size == 1 and not strategy.offload_parameters else 1
    persistent = copies * _persistent(sizes, strategy)
    optimizer_here = 0 if strategy.offload_optimizer else 1
    parameters_here = 0 if strategy.offload_parameters else 1
    fetched = copies * min(strategy.prefetch_bucket, total)
    updated = min(part, strategy.sub_group)
    host = (1 - optimizer_here) * (_ADAMW + FP32 + element) + (1 - parameters_here) * element
    return ModelStates(
        parameters=element * (parameters_here * part + persistent),
        optimizer=optimizer_here * _ADAMW * part,
        gradients=optimizer_here * element * part,
        held=optimizer_here * element * part,
        gathered=element * (copies * kept_gathered(sizes, strategy) - persistent),
        bucket=element * strategy.reduce_bucket,
        bucket_copy=element * (min(strategy.reduce_bucket, total) + fetched),
        update=optimizer_here * (element * part + FP32 * updated),
        cast=0 if element == FP32 else optimizer_here * element * updated,
        host=host * part,
    )


def _persistent(sizes: list[int], strategy: Strategy) -> int:
    return sum(size for size in sizes if size <= strategy.persistence_threshold)


def kept_gathered(sizes: list[int], strategy: Strategy) -> int:
    """Elements that ZeRO-3 does not release between their forward and their backward pass.

    A weight is reused after all that follow it, forward and backward, so those with less than half
    the reuse distance behind them are kept. DeepSpeed also prefetches a bucket at every module: it
    runs ahead of the computation up to the live limit, and keeps what it passed.
    """
    ahead = strategy.max_live if strategy.prefetch_bucket else 0
    kept = min(sum(sizes), max(strategy.max_reuse_distance // 2, ahead))
    return max(_persistent(sizes, strategy), kept)


@dataclass(frozen=True)
class Activations:
    """Bytes that a micro-batch keeps for its backward pass, its largest temporaries, its clips."""

    saved: int
    workspace: int
    clips: int


def activations(
    recipe: EncoderRecipe, micro_batch: int, strategy: Strategy = Strategy()
) -> Activations:
    """Activations of one forward pass on one rank.

    Attention is fused: attention weights are not kept, but the boolean mask becomes a matrix of the
    run's precision, one per layer for any batch. With sequence parallelism a rank has its share of
    the encoder's tokens; the rest is as on one rank.
    """
    size, element, model = recipe.size, _element(recipe), recipe.transformer
    encoded, group = recipe.counts.encoded, strategy.sequence_parallel
    tokens = micro_batch * math.ceil(encoded / group)
    block = _attention(recipe, tokens, size.width, size.heads, encoded * encoded)
    block += _mlp(recipe, tokens, size.width, size.mlp)
    if group > 1:  # attention's output exists twice, split by heads and by tokens
        block += element * tokens * size.width
    blocks = _layers(size.depth, block, element * tokens * size.width, strategy)
    pixels = micro_batch * recipe.geometry.num_tokens * recipe.geometry.cube_values  # uint8
    layer, rest = 0, 0
    if model.decoder is not None:
        rest, layer, loss = _of_decoder(recipe, model.decoder, micro_batch, tokens, strategy)
        # The clips cut into cubes are a second copy while the loss is made.
        workspace = loss + pixels
    else:
        if model.class_attention:  # tokens before and after a norm, keys, values
            rest = tokens * (element * 4 * size.width + _NORM_STATISTICS)
        # Copies of the clips (cubes, or two in fp32 where clips are mixed); or, when the backward
        # pass begins and the pooling's tensors are freed, gradients of the last MLP.
        copies = (2 * FP32 if model.mixes_clips else 1) * pixels
        workspace = max(copies, element * tokens * (size.mlp + size.width) - rest)
    return Activations(
        saved=element * tokens * recipe.geometry.cube_values + blocks + rest,
        workspace=max(workspace, max(block, layer) if strategy.recompute else 0),
        clips=pixels,
    )


def _of_decoder(
    recipe: EncoderRecipe, decoder: DecoderShape, micro_batch: int, own: int, strategy: Strategy
) -> tuple[int, int, int]:
    """Bytes kept from the encoder's last norm (of `own` tokens) on, of a layer, of the loss."""
    element, counts, outputs = _element(recipe), recipe.counts, recipe.transformer.outputs
    inputs, width, heads = recipe.size.width, decoder.width, decoder.heads
    tokens, rows = micro_batch * counts.encoded, micro_batch * counts.decoded
    layer = _mlp(recipe, rows, width, DECODER_MLP_RATIO * width)
    if decoder.crosses:
        mask = counts.decoded * counts.encoded
        layer += _attention(recipe, rows, width, heads, mask, own_keys=False)
        layer += element * 2 * tokens * width  # keys and values
    if decoder.self_attention:
        layer += _attention(recipe, rows, width, heads, counts.decoded * counts.decoded)
    encoded = own * (element * inputs + _NORM_STATISTICS) + tokens * element * (inputs + width)
    queries = micro_batch * counts.predicted
    head = queries * (2 * element * width + _NORM_STATISTICS + FP32 * outputs)
    kept = encoded + _layers(decoder.depth, layer, element * rows * width, strategy) + head
    return kept, layer, _LOSS_TEMPORARIES * queries * outputs


def _layers(depth: int, full: int, inputs: int, strategy: Strategy) -> int:
    """Bytes of a stack in which recomputed layers keep their inputs only."""
    recomputed = math.ceil(depth / strategy.recompute) if strategy.recompute else 0
    return recomputed * inputs + (depth - recomputed) * full


def _element(recipe: EncoderRecipe) -> int:
    return BYTES[recipe.train.precision]


def _attention(
    recipe: EncoderRecipe, rows: int, width: int, heads: int, mask: int, *, own_keys: bool = True
) -> int:
    """Norm and attention: input, normalised, queries, output [, keys, values], `mask` elements."""
    element, tensors = _element(recipe), 6 if own_keys else 4
    kept = rows * (element * tensors * width + _NORM_STATISTICS + heads * _SOFTMAX_ROW)
    decoder = recipe.transformer.decoder
    return kept + (element * mask if decoder is not None and decoder.crosses else 0)


def _mlp(recipe: EncoderRecipe, rows: int, width: int, hidden: int) -> int:
    """Norm and MLP: input, normalised, before and after the activation function."""
    return rows * (_element(recipe) * (2 * width + 2 * hidden) + _NORM_STATISTICS)


@dataclass(frozen=True)
class Footprint:
    """Bytes on the GPU at the instants of a step that may reach its peak.

    start: weights are copied into flat buffers. forward: all activations exist. backward: all
    gradients exist; between the two, activations shrink as gradients grow. update: AdamW runs.
    """

    states: ModelStates
    activations: Activations
    start: int
    forward: int
    backward: int
    update: int

    @property
    def peak(self) -> int:
        return max(self.start, self.forward, self.backward, self.update)


def footprint(
    recipe: EncoderRecipe, strategy: Strategy, world_size: int, micro_batch: int, accumulation: int
) -> Footprint:
    """Memory of a step on one rank's GPU."""
    states = model_states(recipe, strategy, world_size=world_size, accumulation=accumulation)
    kept = activations(recipe, micro_batch, strategy)
    # ZeRO-3's bucket exists all the time.
    always = states.rest + kept.clips + (states.bucket if strategy.stage == 3 else 0)
    passing = states.bucket if strategy.stage < 3 else 0
    weights, gradients = _element(recipe) * sum(map(sum, parameter_sizes(recipe))), states.gradients
    if strategy.stage == 1 and not strategy.offload_optimizer:
        gradients = weights  # reduced only when all exist
    # Stage 2 allocates all of its gradients when it reduces the first bucket.
    temporaries = max(kept.workspace, states.gradients if strategy.stage == 2 else 0)
    return Footprint(
        states=states,
        activations=kept,
        start=weights + (states.parameters if strategy.stage else 0),
        forward=always + states.held + states.gathered + passing + kept.saved + temporaries,
        backward=always + gradients + passing + states.bucket_copy,
        update=always + states.update + states.cast,
    )
