"""Pretrain a video encoder.

    arvideo pretrain                                            demo; one process, CPU or GPU
    deepspeed --module arvideo_ds pretrain --deepspeed_config zero2 \\
        --recipe pretrain_vit_b_k400 data.shards=/data/k400-train
    arvideo pretrain --recipe pretrain_vit_b_k400 --init-from RUN data.shards=MINE
    torchrun --nproc_per_node 8 -m arvideo_ds pretrain ...      srun arvideo pretrain ...

The same command resumes an interrupted run from the newest complete checkpoint in --output.
"""

from __future__ import annotations

import os
from pathlib import Path

from arvideo_ds.config import PretrainRecipe
from arvideo_ds.errors import UserError, command
from arvideo_ds.runs import run_folder
from arvideo_ds.train.command_line import add_init_from, init_from, train, training_parser

DEMO, EXAMPLE = "demo", "pretrain_vit_b_k400"


@command
def main() -> int:
    parser = training_parser(__doc__, "pretrain", "zero2")
    add_init_from(parser)
    parser.add_argument(
        "--resume",
        type=Path,
        help="start from another run's checkpoint; same model, objective, clips and order",
    )
    args = parser.parse_intermixed_args()
    if args.resume is not None and args.init_from is not None:
        raise UserError(
            "--resume continues another run with its optimiser and its place in the data, "
            "--init-from starts at step 0 with its weights alone. Give one of them."
        )
    if args.resume is not None:
        run_folder.read_recipe(args.resume, PretrainRecipe)
    if args.recipe is None and not args.dry_run and os.environ.get("RANK", "0") == "0":
        print(f"no --recipe given: this is the demo. Real runs: --recipe {EXAMPLE}", flush=True)
    overrides = [*args.overrides, *init_from(args, "pretrain")]
    return train(args, PretrainRecipe, recipe=args.recipe or DEMO, overrides=overrides)
