"""Which ZeRO stage and micro-batch for a recipe on these GPUs, and what more GPUs would bring.

    arvideo plan --recipe pretrain_vit_g_k400 --gpus 64 --gpu h100
    arvideo plan --recipe R --gpus 8 --gpu_memory_gib 48 --tflops 150 --bandwidth_gb_s 40 --json

Bytes and seconds are computed from the recipe; nothing runs. docs/planning.md explains how, and
compares them with measurements.
"""

from __future__ import annotations

import json
from pathlib import Path

from arvideo_ds.arguments import CommandParser, add_deepspeed, add_overrides, require_positive
from arvideo_ds.config import EncoderRecipe, Recipe, load_recipe
from arvideo_ds.errors import UserError, command
from arvideo_ds.planning.advice import advise
from arvideo_ds.planning.gpus import GPUS, UTILIZATION
from arvideo_ds.planning.memory import Strategy
from arvideo_ds.planning.text import as_document, print_advice
from arvideo_ds.train.settle import RunOptions, settle


@command
def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--recipe", required=True, metavar="NAME|PATH")
    parser.add_argument("--gpus", type=int, required=True, help="number of GPUs, all hosts")
    parser.add_argument("--gpu", metavar="NAME", help="such as h100: its memory and peak rate")
    parser.add_argument("--gpu_memory_gib", type=float, help="required without --gpu")
    add_deepspeed(parser, "zero2")
    parser.add_argument("--tflops", type=float, help="achieved per GPU; assumed 100 without --gpu")
    parser.add_number("utilization", UTILIZATION, "share of the peak of --gpu that is achieved")
    parser.add_argument("--bandwidth_gb_s", type=float, help="sent per GPU; assumed 20")
    parser.add_argument(
        "--decode_clips_per_s_per_core", type=float, help="as measured by arvideo benchmark_loader"
    )
    parser.add_argument("--cores_per_gpu", type=int, help="warns where they cannot decode enough")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    add_overrides(parser)
    args = parser.parse_intermixed_args()
    require_positive(args, "gpus", "gpu_memory_gib", "tflops", "bandwidth_gb_s", "utilization")
    require_positive(args, "decode_clips_per_s_per_core", "cores_per_gpu")
    gpu = None if args.gpu is None else GPUS.choose(args.gpu, key="--gpu")
    memory_gib = args.gpu_memory_gib or (gpu and gpu.memory_gib)
    if not memory_gib:
        raise UserError(f"give --gpu (one of {', '.join(GPUS)}) or --gpu_memory_gib.")
    if load_recipe(args.recipe, args.overrides, Recipe).task == "tokenizer":
        raise UserError(
            f"{args.recipe} trains a tokenizer: the memory of its convolutions is not modelled. "
            "`arvideo tokenizer --dry_run` prints its plan without memory."
        )
    options = RunOptions(args.recipe, args.deepspeed_config, args.overrides)
    settings = settle(options, EncoderRecipe, world_size=args.gpus)
    tflops, tflops_from = args.tflops, ""
    if tflops is None and gpu is not None and settings.recipe.train.precision != "fp32":
        tflops = args.utilization * gpu.peak_tflops
        tflops_from = f" ({args.utilization:.0%} of {gpu.peak_tflops:g}, assumed; --utilization)"
    elif tflops is None:
        tflops_from = " (assumed; give --tflops, or --gpu in half precision)"
    shards = settings.shards
    of_shards = {}
    if shards is not None:
        of_shards = {"stored_bytes": shards.num_bytes, "layers": min(s.layers for s in shards.sets)}
    advice = advise(
        Path(args.recipe).stem,
        args.deepspeed_config.name,
        settings.recipe,
        settings.plan,
        Strategy.from_json(settings.deepspeed),
        num_gpus=args.gpus,
        memory_gib=memory_gib,
        tflops=tflops,
        tflops_from=tflops_from,
        bandwidth_gb_s=args.bandwidth_gb_s,
        **of_shards,
        decode_rate=args.decode_clips_per_s_per_core,
        cores_per_gpu=args.cores_per_gpu,
    )
    if args.json:
        print(json.dumps(as_document(advice), indent=1))
    else:
        print_advice(advice)
