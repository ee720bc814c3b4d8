#!/usr/bin/env python3
"""Train the adaptive tokenizer of long video: a code for every token, and which tokens matter.

    python scripts/train_tokenizer.py                                                       (demo)
    deepspeed scripts/train_tokenizer.py --deepspeed_config ds_configs/zero1.json \\
        --recipe tokenizer_b_k600 data.shards=/data/k600-train evaluation.shards=/data/k600-val
    torchrun, srun and plain python start it too, as scripts/pretrain.py.

The same command goes on where an interrupted run stopped. After it: scripts/evaluate_tokenizer.py
RUN, and the scores of long videos from it. Exit codes: 0 finished; 2 wrong input; 75 interrupted
and saved, start it again.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path

from arvideo_ds.config import TokenizerRecipe, recipe_names
from arvideo_ds.config.plan import notes
from arvideo_ds.engine.launcher import planned_world_size
from arvideo_ds.errors import EXIT_OK, UserError, command
from arvideo_ds.train.settle import Options, settle

DEMO = "tokenizer_demo"
DEFAULT_JSON = Path(__file__).parent.parent / "ds_configs" / "zero1.json"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(recipe_names("tokenizer"))
    parser.add_argument(
        "--recipe", metavar="NAME|PATH", default=DEMO, help=f"one of: {names}; or a YAML file"
    )
    parser.add_argument("--deepspeed_config", type=Path, default=DEFAULT_JSON)
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
    options = Options(
        recipe=args.recipe,
        deepspeed_config=args.deepspeed_config,
        overrides=args.overrides,
        output=args.output,
    )
    if options.recipe == DEMO and not args.dry_run:
        from arvideo_ds.data.demo_set import ensure_demo_shards

        ensure_demo_shards()
    world_size = planned_world_size() if args.world_size is None else args.world_size
    if world_size < 1:
        raise UserError(f"--world_size {world_size} must be 1 or more.")
    settings = settle(options, TokenizerRecipe, world_size=world_size)
    if args.dry_run:
        print(json.dumps(settings.as_dict(), indent=1))
        for note in notes(settings.recipe, settings.plan):
            print(f"note: {note}", file=sys.stderr, flush=True)
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
