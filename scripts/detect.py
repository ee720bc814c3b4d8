#!/usr/bin/env python3
"""Train a detector of actions (AVA) on an encoder: which of 80 actions happen in each box.

    deepspeed scripts/detect.py --deepspeed_config ds_configs/zero1.json \\
        --recipe detect_vit_b_ava --init-from runs/pretrain_vit_b_k400 \\
        data.shards=/data/ava-train detect.annotations=ava_train_v2.2.csv \\
        evaluation.shards=/data/ava-val evaluation.annotations=ava_val_v2.2.csv
    torchrun, srun and plain python start it too, as scripts/pretrain.py.

The same command goes on where an interrupted run stopped. After it: scripts/evaluate_detection.py.
docs/detection.md has the files of boxes. Exit codes: 0 finished; 2 wrong input; 75 interrupted and
saved, start it again.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path

from arvideo_ds.config import DetectRecipe, recipe_names
from arvideo_ds.engine.launcher import planned_world_size
from arvideo_ds.errors import EXIT_OK, UserError, command
from arvideo_ds.train.settle import Options, settle

DEFAULT_JSON = Path(__file__).parent.parent / "ds_configs" / "zero1.json"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(recipe_names("detect"))
    parser.add_argument(
        "--recipe", metavar="NAME|PATH", required=True, help=f"one of: {names}; or a YAML file"
    )
    parser.add_argument("--deepspeed_config", type=Path, default=DEFAULT_JSON)
    parser.add_argument(
        "--init-from", "--init_from", metavar="PATH", help="weights to begin with; none = scratch"
    )
    parser.add_argument("--output", type=Path, help="folder of the run; default runs/<recipe>")
    parser.add_argument(
        "--dry_run", action="store_true", help="print recipe, plan and DeepSpeed dict"
    )
    parser.add_argument("--world_size", type=int, help="with --dry_run: ranks to plan for")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args()


@command
def main() -> int:
    args = parse_arguments()
    init_from = [] if args.init_from is None else [f"detect.init_from={args.init_from}"]
    options = Options(
        recipe=args.recipe,
        deepspeed_config=args.deepspeed_config,
        overrides=[*args.overrides, *init_from],
        output=args.output,
    )
    world_size = planned_world_size() if args.world_size is None else args.world_size
    if world_size < 1:
        raise UserError(f"--world_size {world_size} must be 1 or more.")
    settings = settle(options, DetectRecipe, world_size=world_size)
    if args.dry_run:
        print(json.dumps(settings.as_dict(), indent=1))
        return EXIT_OK
    shards = settings.require_shards()
    # Only now: torch and DeepSpeed take seconds to load, and settings are wrong more often.
    from arvideo_ds.train.run import start

    code = start(options, settings, shards)
    # As in pretrain.py: srun ends the others with SIGTERM when the first rank leaves.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return code


if __name__ == "__main__":
    sys.exit(main())
