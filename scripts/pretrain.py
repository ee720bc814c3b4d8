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

import argparse
import json
import os
import signal
import sys
from pathlib import Path

from arvideo_ds.config import PretrainRecipe, recipe_names
from arvideo_ds.config.plan import notes
from arvideo_ds.engine.launcher import planned_world_size
from arvideo_ds.errors import EXIT_OK, UserError, command
from arvideo_ds.train.settle import Options, settle

DEMO, EXAMPLE = "demo", "pretrain_vit_b_k400"
DEFAULT_JSON = Path(__file__).parent.parent / "ds_configs" / "zero2.json"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(recipe_names("pretrain"))
    parser.add_argument("--recipe", metavar="NAME|PATH", help=f"one of: {names}; or a YAML file")
    parser.add_argument("--deepspeed_config", type=Path, default=DEFAULT_JSON)
    parser.add_argument("--output", type=Path, help="folder of the run; default runs/<recipe>")
    parser.add_argument("--resume", type=Path, help="another run's folder to go on from")
    parser.add_argument(
        "--dry_run", action="store_true", help="print recipe, plan and DeepSpeed dict as JSON"
    )
    parser.add_argument("--world_size", type=int, help="with --dry_run: ranks to plan for")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args()


@command
def main() -> int:
    args = parse_arguments()
    options = Options(
        recipe=args.recipe or DEMO,
        deepspeed_config=args.deepspeed_config,
        overrides=args.overrides,
        output=args.output,
        resume=args.resume,
    )
    if args.dry_run:
        world_size = planned_world_size() if args.world_size is None else args.world_size
        if world_size < 1:
            raise UserError(f"--world_size {world_size} must be 1 or more.")
        settings = settle(options, PretrainRecipe, world_size=world_size)
        print(json.dumps(settings.as_dict(), indent=1))
        for note in notes(settings.recipe, settings.plan):
            print(f"note: {note}", file=sys.stderr, flush=True)
        return EXIT_OK
    if options.recipe == DEMO:
        if args.recipe is None and os.environ.get("RANK", "0") == "0":
            print(f"no --recipe given: this is the demo. Real runs: --recipe {EXAMPLE}", flush=True)
        from arvideo_ds.data.demo_set import ensure_demo_shards

        ensure_demo_shards()
    settings = settle(options, PretrainRecipe, world_size=planned_world_size())
    shards = settings.require_shards()
    # Only now: torch and DeepSpeed take seconds to load, and settings are wrong more often.
    from arvideo_ds.train.run import start

    code = start(options, settings, shards)
    # The first rank that ends with another code than 0 makes srun end the others with SIGTERM;
    # their code would then be that, and the job would not be requeued.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return code


if __name__ == "__main__":
    sys.exit(main())
