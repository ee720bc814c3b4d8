"""What a step of pretraining costs: time, memory, operations. JSON on stdout.

    arvideo benchmark --compare pretrain_vit_b_k400 pretrain_vit_b_k400:paper
    arvideo benchmark --micro_batch 2 train.precision=fp32 \\
        --compare pretrain_vit_b_k400_paper pretrain_vit_b_k400,decoder.target_ratio=0.5
    arvideo benchmark --compare pretrain_vit_b_k400 --largest_batch          (CUDA)

A row is a recipe (name or path), `:paper` for the way in which the paper ran it (attention not
fused, every token embedded before the encoded ones are picked), and settings of its own after
commas; settings that stand alone are for all rows. All rows take the same number of clips, made on
the device, so no loader is in it, in turns within one process: median, least and most over rounds.
--shards feeds the first row from real shards as well. Each step is DeepSpeed's, on one rank.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
from pathlib import Path

from arvideo_ds.arguments import (
    CommandParser,
    add_deepspeed,
    add_overrides,
    add_rank,
    from_arguments,
    require_at_least,
)
from arvideo_ds.benchmark.rows import Options, read_row
from arvideo_ds.benchmark.text import one_line, rounded, table
from arvideo_ds.engine.launcher import planned_world_size
from arvideo_ds.errors import UserError, command
from arvideo_ds.shards.manifest import ShardSet

_OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.\w+)+=")


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--compare", nargs="+", default=["pretrain_vit_b_k400"], metavar="ROW")
    parser.add_argument("--micro_batch", type=int, default=8, help="clips of a step, of all rows")
    parser.add_argument("--rounds", type=int, default=5, help="turns that every row has")
    parser.add_argument("--steps", type=int, default=5, help="steps of a row in one round")
    parser.add_argument("--warm_up", type=int, default=3, help="steps of a row before the first")
    parser.add_argument("--compile", action="store_true", help="train.compile=true for all rows")
    parser.add_argument("--shards", metavar="SHARDS", help="feed the first row from these as well")
    parser.add_argument(
        "--largest_batch", action="store_true", help="the largest micro-batch that fits (CUDA)"
    )
    parser.add_argument("--profile", action="store_true", help="operators of each row, grouped")
    parser.add_argument("--trace", type=Path, metavar="FOLDER", help="with --profile: traces too")
    add_deepspeed(parser, "zero0")
    add_rank(parser)
    add_overrides(parser)
    args = parser.parse_intermixed_args()
    # What stands after --compare may be meant for all rows.
    args.overrides += [text for text in args.compare if _OVERRIDE.match(text)]
    args.overrides += ["train.compile=true"] if args.compile else []
    args.compare = [text for text in args.compare if not _OVERRIDE.match(text)]
    return args


def check(args: argparse.Namespace) -> None:
    require_at_least(1, args, "rounds", "steps", "warm_up")
    if not args.compare:
        raise UserError("--compare names no row; give recipes, such as pretrain_vit_b_k400.")
    if args.trace and not args.profile:
        raise UserError("--trace writes what --profile sees; add --profile.")
    if args.shards is not None:
        ShardSet(args.shards).check_sizes()
    if planned_world_size() > 1:
        raise UserError(
            "this measures one process; start it with python, without a launcher. A run on many "
            "logs its own throughput (metrics.jsonl)."
        )


@command
def main() -> None:
    args = parse_arguments()
    check(args)
    rows = [
        read_row(
            text,
            args.overrides,
            micro_batch=args.micro_batch,
            deepspeed_config=args.deepspeed_config,
        )
        for text in args.compare
    ]
    options = from_arguments(Options, args)
    # DeepSpeed writes its notes to stdout, which is the document's alone.
    with contextlib.redirect_stdout(sys.stderr):
        # Only now: torch takes seconds to load, and rows are wrong more often.
        from arvideo_ds.benchmark.measure import measure

        document = measure(rows, options, say)
    for result in document["rows"]:
        say(one_line(result))
        for line in table(result.get("profile")):
            say(line)
    settings = {
        "overrides": args.overrides,
        "deepspeed_config": args.deepspeed_config.name,
        **{name: getattr(args, name) for name in ("micro_batch", "rounds", "steps", "warm_up")},
    }
    print(json.dumps(rounded({"settings": settings, **document}), indent=1))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
