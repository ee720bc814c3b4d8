"""What a step of pretraining costs: time, memory, operations. JSON on stdout.

    arvideo benchmark --compare pretrain_vit_b_k400 pretrain_vit_b_k400:paper
    arvideo benchmark --micro_batch 2 train.precision=fp32 \\
        --compare pretrain_vit_b_k400_paper pretrain_vit_b_k400,decoder.target_ratio=0.5
    arvideo benchmark --compare pretrain_vit_b_k400 --largest_batch          (CUDA)
    arvideo benchmark --micro_batch 64,128 --profile --trace traces          (CUDA)

A row is a recipe (name or path), an optional `:paper` (the paper's way: attention not fused, every
token embedded before the encoded ones are picked), and its own settings after commas; separate
settings apply to all rows. Rows take turns in one process, on the same number of clips, which are
made on the device: no loader. Figures are median, minimum and maximum over the rounds. --shards
also feeds the first row from real shards. Each step is DeepSpeed's, on one rank. On a GPU the
defaults are 64 clips per step and zero1, on a CPU 8 and zero0.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
from pathlib import Path
from typing import Any

from arvideo_ds.arguments import (
    CommandParser,
    add_deepspeed,
    add_overrides,
    add_rank,
    find_deepspeed_config,
    from_arguments,
    require_at_least,
)
from arvideo_ds.benchmark.rows import BenchmarkOptions, Row, read_row
from arvideo_ds.cli import log
from arvideo_ds.engine.launcher import planned_world_size, uses_gpu
from arvideo_ds.errors import UserError, command
from arvideo_ds.shards.manifest import ShardSet

_OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.\w+)+=")


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--compare", nargs="+", default=["pretrain_vit_b_k400"], metavar="ROW")
    help_of_batch = "clips per step, for all rows; 64,128: every row at each of them"
    parser.add_argument("--micro_batch", type=batches, metavar="CLIPS", help=help_of_batch)
    parser.add_number("rounds", 5, "turns of every row")
    parser.add_number("steps", 5, "steps of a row per round")
    parser.add_number("warm_up", 3, "steps of a row before the first round")
    parser.add_argument("--compile", action="store_true", help="train.compile=true for all rows")
    parser.add_argument("--shards", metavar="SHARDS", help="also feed the first row from these")
    parser.add_argument("--largest_batch", action="store_true", help="search for it (CUDA)")
    parser.add_argument("--profile", action="store_true", help="operators of each row, grouped")
    parser.add_argument("--trace", type=Path, metavar="FOLDER", help="with --profile: traces too")
    add_deepspeed(parser, None)
    add_rank(parser)
    add_overrides(parser)
    args = parser.parse_intermixed_args()
    # argparse takes settings after --compare as rows.
    args.overrides += [text for text in args.compare if _OVERRIDE.match(text)]
    args.overrides += ["train.compile=true"] if args.compile else []
    args.compare = [text for text in args.compare if not _OVERRIDE.match(text)]
    return args


def batches(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def check(args: argparse.Namespace) -> None:
    require_at_least(1, args, "rounds", "steps", "warm_up")
    if not args.compare:
        raise UserError("--compare names no row; give recipes, such as pretrain_vit_b_k400.")
    if args.trace and not args.profile:
        raise UserError("--trace writes what --profile measures; add --profile.")
    if args.shards is not None:
        ShardSet(args.shards).check_sizes()
    if planned_world_size() > 1:
        raise UserError(
            "this measures one process; start it without a launcher. A run on several processes "
            "logs its own throughput (metrics.jsonl)."
        )


def read_rows(args: argparse.Namespace) -> list[Row]:
    """Every row at every micro-batch; sets what was not given."""
    stage, batch = ("zero1", 64) if uses_gpu() else ("zero0", 8)
    args.deepspeed_config = args.deepspeed_config or find_deepspeed_config(stage)
    args.micro_batch = args.micro_batch or [batch]
    return [
        read_row(text, args.overrides, micro_batch, args.deepspeed_config)
        for micro_batch in args.micro_batch
        for text in args.compare
    ]


@command
def main() -> None:
    args = parse_arguments()
    check(args)
    rows = read_rows(args)
    options = from_arguments(BenchmarkOptions, args)
    # DeepSpeed writes notes to stdout, where only the document belongs.
    with contextlib.redirect_stdout(sys.stderr):
        from arvideo_ds.benchmark.measure import measure

        document = measure(rows, options, log)
    for result in document["rows"]:
        log(one_line(result))
        for line in operator_table(result.get("profile")):
            log(line)
    settings = {
        "overrides": args.overrides,
        "deepspeed_config": args.deepspeed_config.name,
        **{name: getattr(args, name) for name in ("micro_batch", "rounds", "steps", "warm_up")},
    }
    text = json.dumps({"settings": settings, **document})
    rounded = json.loads(text, parse_float=lambda number: float(f"{float(number):.5g}"))
    print(json.dumps(rounded, indent=1))


def one_line(result: dict[str, Any]) -> str:
    peak = result["peak_gib"]
    memory = "memory not measured" if peak is None else f"{peak:.2f} GiB"
    line = (
        f"{result['row']} x {result['micro_batch']}: "
        f"{result['clips_per_s']['median']:.2f} clips/s, "
        f"{result['forward_ms']['median']:.1f} + {result['backward_ms']['median']:.1f} + "
        f"{result['optimizer_ms']['median']:.1f} ms (forward, backward, optimiser), "
        f"{memory}, {result['share_of_matmul_pct']:.0f} % of a matrix product"
    )
    if "against_first" in result:
        against = result["against_first"]
        time = f"{against['time_pct']['median']:+.1f} % time"
        line += f"; {time}"
        if against["memory_pct"] is not None:
            line += f", {against['memory_pct']:+.1f} % memory"
    return line


def operator_table(profile: dict[str, Any] | None) -> list[str]:
    """Groups of operators, and other operators with at least half a percent."""
    if profile is None:
        return []
    lines = [(name, of, "") for name, of in profile["groups"].items()]
    rest = profile["rest_by_name"].items()
    lines += [(name, of, "  ") for name, of in rest if of["share_pct"] >= 0.5]
    return [f"{of['share_pct']:8.2f} % {of['ms']:12.3f} ms  {pad}{name}" for name, of, pad in lines]
