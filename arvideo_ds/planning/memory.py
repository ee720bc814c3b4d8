"""Memory of a training step, from the recipe alone: model states under ZeRO, and activations.

Model states follow the allocations of DeepSpeed 0.19, which differ from the ZeRO paper's table and
from DeepSpeed's estimators; tests measure them on live tensors (docs/planning.md). All numbers are
bytes of one rank. Activations are counted tensor by tensor, as autograd keeps them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from arvideo_ds.config import EncoderRecipe, Recipe
from arvideo_ds.config.sizes import DECODER_MLP_RATIO, PROBE_MLP_RATIO, DecoderShape
from arvideo_ds.planning.cost import encoder_sizes, parameter_sizes, teacher_tokens, trained_sizes

FP32 = 4
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# AdamW under ZeRO or half precision: a master copy and two moments in fp32.
_ADAMW = 3 * FP32
# Plain data parallel flattens so many gradients into one all-reduce.
_ALL_REDUCE_ELEMENTS = 500_000_000
# Mean and deviation of a token, and its row of the softmax in each head, stay in fp32.
_NORM_STATISTICS, _SOFTMAX_ROW = 2 * FP32, FP32
# Bytes of the loss' temporaries per predicted value. Forward: its pixel, and in fp32 the prediction
# and the statistics that normalise the target; backward: gradients in fp32.
_LOSS_FORWARD, _LOSS_BACKWARD = 1 + 3 * FP32, 4 * FP32
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


def stage_of_run(stage: int, recipe: Recipe, accumulation: int) -> int:
    """The ZeRO stage that a run uses in place of a given one, in half precision.

    With fp32 weights for each parameter, DeepSpeed (0.19.8) launches 4,013 kernels and waits 220
    times in an update of ViT-B at stage 0, 24 and once at stage 1 (docs/performance.md). To sum
    gradients in fp32 at stage 1 it changes to an optimiser (BF16_Optimizer) that keeps them whole
    on every rank, reduces them in one fp32 pass and launches kernels for each parameter; stage 2
    sums its part.
    """
    if recipe.train.precision == "fp32":
        return stage
    return max(stage, 2 if recipe.train.gradients_in(accumulation) == "fp32" else 1)


@dataclass(frozen=True, kw_only=True)
class ModelStates:
    """Bytes of one rank's GPU, and of the host memory that offloading takes.

    parameters   the weights that forward and backward use (ZeRO-3: this rank's part)
    optimizer    fp32 master weights, where there is a second copy, AdamW's moments, and the moving
                 average of the weights where the recipe keeps one
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
    sizes, trained, element = encoder + decoder, trained_sizes(recipe), _element(recipe)
    summed = BYTES[recipe.train.gradients_in(accumulation)]
    kept = _ADAMW if recipe.ema_decay is None else _ADAMW + FP32
    total = sum(trained)
    if strategy.stage == 3:
        return _zero_3(sizes, trained, element, summed, kept, strategy, world_size)
    if strategy.stage == 0:
        states = _data_parallel(total, kept, world_size, accumulation)
    elif summed > element:
        states = _zero_2_in_fp32(total, element, kept, strategy, world_size, accumulation)
    else:
        states = _zero_1_2(total, element, kept, strategy, world_size, accumulation)
    frozen = element * (sum(sizes) - total)
    return replace(states, parameters=states.parameters + frozen)


def _data_parallel(total: int, kept: int, world_size: int, accumulation: int) -> ModelStates:
    """fp32: AdamW updates the weights that the model uses. Half precision has no stage 0.

    kept: bytes per weight of master weights, moments and average, also below.
    """
    reduced = 0 if world_size == 1 else min(total, _ALL_REDUCE_ELEMENTS)
    return ModelStates(
        parameters=FP32 * total,
        optimizer=(kept - FP32) * total,
        gradients=FP32 * total,
        held=FP32 * total if accumulation > 1 else 0,
        bucket_copy=FP32 * reduced,
        update=FP32 * total,
    )


def _zero_1_2(
    total: int, element: int, kept: int, strategy: Strategy, world_size: int, accumulation: int
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
        optimizer=here * kept * part,
        gradients=here * element * part,
        held=accumulates * here * element * (total if strategy.stage == 1 else part),
        bucket=element * (2 if strategy.overlap_comm else 1) * strategy.reduce_bucket,
        bucket_copy=element * min(strategy.reduce_bucket, total),
        update=here * (element + FP32) * part,
        cast=0 if element == FP32 else here * element * part,
        host=(1 - here) * (kept + FP32 + element + accumulates * element) * part,
    )


def _zero_2_in_fp32(
    total: int, element: int, kept: int, strategy: Strategy, world_size: int, accumulation: int
) -> ModelStates:
    """Half precision with gradients summed in fp32: one flat part, which AdamW reads as it is.

    It stays on the GPU where the optimiser is offloaded.
    """
    part = math.ceil(total / world_size)
    here = 0 if strategy.offload_optimizer else 1
    return ModelStates(
        parameters=element * total,
        optimizer=here * kept * part,
        gradients=FP32 * part,
        held=FP32 * part if accumulation > 1 else 0,
        bucket=element * (2 if strategy.overlap_comm else 1) * strategy.reduce_bucket,
        bucket_copy=element * min(strategy.reduce_bucket, total),
        update=FP32 * part,
        host=(1 - here) * (kept + FP32 + element) * part,
    )


def _zero_3(
    sizes: list[int],
    trained: list[int],
    element: int,
    summed: int,
    kept: int,
    strategy: Strategy,
    world_size: int,
) -> ModelStates:
    """Each weight is split among the ranks; small ones are kept whole in addition.

    trained: those of `sizes` that are. summed: bytes of a gradient in the sum over micro-batches.
    """
    total = sum(sizes)
    whole, part = (sum(math.ceil(n / world_size) for n in counts) for counts in (sizes, trained))
    # A single rank has everything on its GPU and copies nothing.
    copies = 0 if world_size == 1 and not strategy.offload_parameters else 1
    persistent = copies * _persistent(sizes, strategy)
    optimizer_here = 0 if strategy.offload_optimizer else 1
    parameters_here = 0 if strategy.offload_parameters else 1
    fetched = copies * min(strategy.prefetch_bucket, total)
    updated = min(part, strategy.sub_group)
    return ModelStates(
        parameters=element * (parameters_here * whole + persistent),
        optimizer=optimizer_here * kept * part,
        gradients=optimizer_here * summed * part,
        held=optimizer_here * summed * part,
        gathered=element * (copies * kept_gathered(sizes, strategy) - persistent),
        bucket=element * strategy.reduce_bucket,
        bucket_copy=element * (min(strategy.reduce_bucket, sum(trained)) + fetched),
        update=optimizer_here * (summed * part + FP32 * updated),
        cast=0 if summed == FP32 else optimizer_here * element * updated,
        host=(1 - optimizer_here) * (kept + FP32 + summed) * part
        + (1 - parameters_here) * element * whole,
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
    """Bytes of a micro-batch.

    saved      what the forward pass keeps for the backward pass
    workspace  the largest temporaries beside it, before the first gradient of a weight
    later      the most of both while weights have gradients
    clips      the clips themselves
    """

    saved: int
    workspace: int
    later: int
    clips: int

    @property
    def peak(self) -> int:
        return max(self.saved + self.workspace, self.later)


def activations(
    recipe: EncoderRecipe, micro_batch: int, strategy: Strategy = Strategy()
) -> Activations:
    """Activations of one forward pass on one rank; with adapters an upper bound.

    Attention is fused: attention weights are not kept, and all layers use one mask (`footprint`).
    With sequence parallelism a rank has its share of the encoder's tokens; the rest is as on one
    rank.
    """
    size, element, model = recipe.size, _element(recipe), recipe.transformer
    encoded, group = recipe.counts.encoded, strategy.sequence_parallel
    tokens = micro_batch * math.ceil(encoded / group)
    block = _attention(recipe, tokens, size.width, size.heads)
    block += _mlp(recipe, tokens, size.width, size.mlp)
    if group > 1:  # attention's output exists twice, split by heads and by tokens
        block += element * tokens * size.width
    blocks = _layers(size.depth, block, element * tokens * size.width, strategy)
    pixels = micro_batch * recipe.geometry.num_tokens * recipe.geometry.cube_values  # uint8
    embedded = element * tokens * recipe.geometry.cube_values
    # Gradients in the last MLP, after its layer was recomputed.
    last = element * tokens * (size.mlp + size.width) + (block if strategy.recompute else 0)
    if model.decoder is not None:
        rest, later, loss = _of_decoder(recipe, model.decoder, micro_batch, tokens, strategy)
        # The clips cut into cubes are a second copy while the loss is made.
        workspace = max(loss * _LOSS_FORWARD + pixels, loss * _LOSS_BACKWARD)
    else:
        rest, later = 0, 0
        values = tokens * model.outputs if recipe.counts.predicted else 0  # of a teacher's features
        if values:
            rest = tokens * (element * size.width + _NORM_STATISTICS) + FP32 * values
        if model.class_attention:  # tokens before and after a norm, keys, values
            rest = tokens * (element * 4 * size.width + _NORM_STATISTICS)
        if model.attentive:
            rest, later = _of_probes(recipe, tokens, strategy)
        # Copies of the clips: cubes, or two in fp32 where clips are mixed.
        workspace = (2 * FP32 if model.mixes_clips else 1) * pixels
        workspace = max(values * _LOSS_FORWARD + workspace, values * _LOSS_BACKWARD)
    encoder = embedded + blocks
    if model.frozen and not model.lora_rank:  # without gradients each layer frees the one before
        encoder, last, workspace = 0, 0, max(workspace, embedded + block)
    passing, features = _of_teacher(recipe, micro_batch)
    return Activations(
        saved=encoder + rest,
        # The teacher's pass comes first; its features are kept until the loss is made.
        workspace=max(workspace + features, passing - encoder - rest),
        later=encoder + max(later, last),
        clips=pixels,
    )


def _of_decoder(
    recipe: EncoderRecipe, decoder: DecoderShape, micro_batch: int, own: int, strategy: Strategy
) -> tuple[int, int, int]:
    """Bytes kept from the encoder's last norm (of `own` tokens) on; the most of them and of
    temporaries while weights have gradients; number of predicted values."""
    element, counts, outputs = _element(recipe), recipe.counts, recipe.transformer.outputs
    inputs, width, heads = recipe.size.width, decoder.width, decoder.heads
    tokens, rows = micro_batch * counts.encoded, micro_batch * counts.decoded
    hidden = DECODER_MLP_RATIO * width
    layer = _mlp(recipe, rows, width, hidden)
    if decoder.crosses:
        layer += _attention(recipe, rows, width, heads, own_keys=False)
        layer += element * 2 * tokens * width  # keys and values
    if decoder.self_attention:
        layer += _attention(recipe, rows, width, heads)
    encoded = own * (element * inputs + _NORM_STATISTICS) + tokens * element * (inputs + width)
    queries = micro_batch * counts.predicted
    head = queries * (2 * element * width + _NORM_STATISTICS)
    layers = encoded + _layers(decoder.depth, layer, element * rows * width, strategy)
    # Gradients of the predictions and the head's inputs; then as in the encoder.
    first = head + element * queries * (outputs + width)
    last = element * rows * (hidden + width) + (layer if strategy.recompute else 0)
    kept = layers + head + FP32 * queries * outputs
    return kept, layers + max(first, last), queries * outputs


def _of_probes(recipe: EncoderRecipe, tokens: int, strategy: Strategy) -> tuple[int, int]:
    """Bytes that all attentive heads keep from the encoder's last norm on; the most of them and of
    temporaries while weights have gradients."""
    model, element, width = recipe.transformer, _element(recipe), recipe.size.width
    hidden = PROBE_MLP_RATIO * width
    block = _attention(recipe, tokens, width, recipe.size.heads)
    block += _mlp(recipe, tokens, width, hidden)
    blocks = _layers(model.attentive - 1, block, element * tokens * width, strategy)
    query = tokens * (element * 4 * width + _NORM_STATISTICS)  # tokens, normalised, keys, values
    shared = element * tokens * width  # the encoded tokens
    kept = model.heads * (blocks + query - shared) + shared
    return kept, kept + element * tokens * (hidden + width) + (block if strategy.recompute else 0)


def _of_teacher(recipe: EncoderRecipe, micro_batch: int) -> tuple[int, int]:
    """Bytes of a teacher's forward pass, in its widest layer, and of its features."""
    teacher = recipe.transformer.teacher
    if teacher is None:
        return 0, 0
    size, rows = teacher.size, micro_batch * teacher_tokens(recipe)
    cubes = FP32 * rows * teacher.geometry.cube_values
    layer = _mlp(recipe, rows, size.width, size.mlp) + _element(recipe) * rows * size.width
    layer = max(layer, _attention(recipe, rows, size.width, size.heads), 2 * cubes)
    return layer, 0 if teacher.scores else _element(recipe) * rows * size.width


def _layers(depth: int, full: int, inputs: int, strategy: Strategy) -> int:
    """Bytes of a stack in which recomputed layers keep their inputs only."""
    recomputed = math.ceil(depth / strategy.recompute) if strategy.recompute else 0
    return recomputed * inputs + (depth - recomputed) * full


def _element(recipe: EncoderRecipe) -> int:
    return BYTES[recipe.train.precision]


def _attention(
    recipe: EncoderRecipe, rows: int, width: int, heads: int, *, own_keys: bool = True
) -> int:
    """Norm and attention: input, normalised, queries, output [, keys, values]."""
    element, tensors = _element(recipe), 6 if own_keys else 4
    return rows * (element * tensors * width + _NORM_STATISTICS + heads * _SOFTMAX_ROW)


def teacher_bytes(recipe: EncoderRecipe) -> int:
    """The weights of a teacher's encoder, whole on every rank; 0 without one."""
    teacher = recipe.transformer.teacher
    if teacher is None:
        return 0
    sizes = encoder_sizes(teacher.size, teacher.geometry.cube_values)
    return _element(recipe) * sum(sizes)


def _masks(recipe: EncoderRecipe) -> int:
    """Masks of encoder and decoder, whatever the batch: in fp32, and in the run's precision."""
    decoder, counts = recipe.transformer.decoder, recipe.counts
    if not recipe.transformer.masked:
        return 0
    pairs = (counts.encoded + counts.decoded) * counts.encoded
    element = _element(recipe)
    copies = FP32 if element == FP32 else FP32 + element
    among = counts.decoded**2 if decoder is not None and decoder.self_attention else 0
    return copies * (pairs + among)


def _mlp(recipe: EncoderRecipe, rows: int, width: int, hidden: int) -> int:
    """Norm and MLP: input, normalised, before and after the activation function."""
    return rows * (_element(recipe) * (2 * width + 2 * hidden) + _NORM_STATISTICS)


@dataclass(frozen=True)
class Footprint:
    """Bytes on the GPU at the instants of a step that may reach its peak.

    start: weights are copied into flat buffers. forward: all activations exist, and the loss.
    reduction: the first gradients of weights exist, and the communication buffer. backward: all
    gradients exist. update: AdamW runs.
    """

    states: ModelStates
    activations: Activations
    start: int
    forward: int
    reduction: int
    backward: int
    update: int

    @property
    def peak(self) -> int:
        return max(self.start, self.forward, self.reduction, self.backward, self.update)


def footprint(
    recipe: EncoderRecipe, strategy: Strategy, world_size: int, micro_batch: int, accumulation: int
) -> Footprint:
    """Memory of a step on one rank's GPU."""
    states = model_states(recipe, strategy, world_size=world_size, accumulation=accumulation)
    kept = activations(recipe, micro_batch, strategy)
    # ZeRO-3's bucket exists all the time.
    always = states.rest + kept.clips + _masks(recipe) + teacher_bytes(recipe)
    always += states.bucket if strategy.stage == 3 else 0
    passing = states.bucket if strategy.stage < 3 else 0
    # Stage 1 reduces, and frees its bucket, after the last of the accumulated micro-steps.
    waiting = passing if strategy.stage == 1 and accumulation > 1 else 0
    total = sum(trained_sizes(recipe))
    # Frozen weights are not copied; ZeRO-3 splits them too.
    whole = sum(map(sum, parameter_sizes(recipe))) if strategy.stage == 3 else total
    weights, gradients = _element(recipe) * total, states.gradients
    if strategy.stage == 1 and not strategy.offload_optimizer:
        gradients = weights  # reduced only when all exist
    later = kept.later
    if strategy.stage == 2 and strategy.reduce_bucket < total:
        # All gradients are allocated when the first bucket is reduced; a sum in fp32 continues.
        continued = recipe.train.gradients_in(accumulation) != recipe.train.precision
        later = max(later, kept.saved + states.gradients - (states.held if continued else 0))
    before = always + states.held + states.gathered
    return Footprint(
        states=states,
        activations=kept,
        start=_element(recipe) * whole + states.parameters if strategy.stage else states.parameters,
        forward=before + waiting + kept.saved + kept.workspace,
        reduction=before + passing + later,
        backward=always + gradients + passing + states.bucket_copy,
        update=always + states.update + states.cast,
    )
