#!/usr/bin/env python3
"""Pretrain a video encoder.

    deepspeed scripts/pretrain.py --deepspeed_config ds_configs/zero2.json                 (demo)
    deepspeed scripts/pretrain.py --deepspeed_config ds_configs/zero2.json \\
        --recipe pretrain_vit_b_k400 data.shards=/data/k400-train
    torchrun --nproc_per_node 8 scripts/pretrain.py ...      srun python scripts/pretrain.py ...
    python scripts/pretrain.py ...                           one process, CPU or GPU

The same command goes on where an interrupted run stopped (newest complete checkpoint in --output).
Exit codes: 0 finished; 2 wrong input; 75 interrupted and saved, start it again.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from arvideo_ds.config import PretrainRecipe
from arvideo_ds.errors import command
from arvideo_ds.runs import run_folder
from arvideo_ds.train.command_line import train, training_parser
from arvideo_ds.train.settle import Options

DEMO, EXAMPLE = "demo", "pretrain_vit_b_k400"
DEFAULT_JSON = Path(__file__).parent.parent / "ds_configs" / "zero2.json"


@command
def main() -> int:
    parser = training_parser(__doc__, "pretrain", DEFAULT_JSON)
    parser.add_argument(
        "--resume",
        type=Path,
        help="go on from another run's checkpoint; same model, objective, clips and order",
    )
    args = parser.parse_intermixed_args()
    options = Options(
        recipe=args.recipe or DEMO,
        deepspeed_config=args.deepspeed_config,
        overrides=args.overrides,
        output=args.output,
        resume=args.resume,
    )
    if args.resume is not None:
        run_folder.read_recipe(args.resume, PretrainRecipe)
    if args.recipe is None and not args.dry_run and os.environ.get("RANK", "0") == "0":
        print(f"no --recipe given: this is the demo. Real runs: --recipe {EXAMPLE}", flush=True)
    return train(args, options, PretrainRecipe)


if __name__ == "__main__":
    sys.exit(main())
