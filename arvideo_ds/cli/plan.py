"""Which ZeRO stage and micro-batch for a recipe on these GPUs, and what more GPUs would bring.

    arvideo plan --recipe pretrain_vit_g_k400 --gpus 64 --gpu_memory_gib 80
    arvideo plan ... --tflops 250 --bandwidth_gb_s 40 --json train.total_batch=2048

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
from arvideo_ds.planning.memory import Strategy
from arvideo_ds.planning.text import as_document, print_advice
from arvideo_ds.train.settle import RunOptions, settle


@command
def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--recipe", required=True, metavar="NAME|PATH")
    parser.add_argument("--gpus", type=int, required=True, help="number of GPUs, all hosts")
    parser.add_argument("--gpu_memory_gib", type=float, required=True)
    add_deepspeed(parser, "zero2")
    parser.add_argument("--tflops", type=float, help="achieved per GPU; assumed 100")
    parser.add_argument("--bandwidth_gb_s", type=float, help="sent per GPU; assumed 20")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    add_overrides(parser)
    args = parser.parse_intermixed_args()
    require_positive(args, "gpus", "gpu_memory_gib", "tflops", "bandwidth_gb_s")
    if load_recipe(args.recipe, args.overrides, Recipe).transformer is None:
        raise UserError(
            f"{args.recipe} trains a tokenizer: the memory of its convolutions is not modelled. "
            "`arvideo tokenizer --dry_run` prints its plan without memory."
        )
    options = RunOptions(args.recipe, args.deepspeed_config, args.overrides)
    settings = settle(options, EncoderRecipe, world_size=args.gpus)
    advice = advise(
        Path(args.recipe).stem,
        args.deepspeed_config.name,
        settings.recipe,
        settings.plan,
        Strategy.from_json(settings.deepspeed),
        num_gpus=args.gpus,
        memory_gib=args.gpu_memory_gib,
        tflops=args.tflops,
        bandwidth_gb_s=args.bandwidth_gb_s,
    )
    if args.json:
        print(json.dumps(as_document(advice), indent=1))
    else:
        print_advice(advice)
