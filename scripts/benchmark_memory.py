#!/usr/bin/env python3
"""Loss and peak memory with and without activation checkpointing, as JSON.

    python scripts/benchmark_memory.py --recipe pretrain_vit_b_k400 --shards SHARDS --ranks 2

Runs scripts/pretrain.py with ds_configs/zero2.json and with zero2_checkpointing.json; compares loss
curves and peak memory of rank 0 (GPU memory, or resident memory on a CPU).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from pathlib import Path

from arvideo_ds.arguments import CommandParser
from arvideo_ds.errors import UserError, command
from arvideo_ds.runs.run_folder import read_metrics
from arvideo_ds.train.signals import Children

ROOT = Path(__file__).parent.parent


@command
def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--recipe", default="pretrain_vit_b_k400")
    parser.add_argument("--shards", required=True)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    results: dict[str, object] = {
        "recipe": args.recipe,
        "ranks": args.ranks,
        "overrides": args.overrides,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
    }
    with tempfile.TemporaryDirectory() as folder, Children() as children:
        for name in ("zero2", "zero2_checkpointing"):
            output = Path(folder) / name
            if code := children.run(pretraining(args, name, output), stdout=sys.stderr):
                raise UserError(f"pretrain.py with {name} ended with code {code}; see above.")
            metrics = read_metrics(output)
            results[name] = {
                "loss": [m["loss/pretrain"] for m in metrics],
                "peak_gib": metrics[-1]["memory/peak_gib"],
                "step_s": metrics[-1]["time/step_s"],
            }
    print(json.dumps(results, indent=1))


def pretraining(args: argparse.Namespace, name: str, output: Path) -> list[str]:
    return [
        "deepspeed",
        f"--num_gpus={args.ranks}",
        str(ROOT / "scripts" / "pretrain.py"),
        f"--deepspeed_config={ROOT}/ds_configs/{name}.json",
        f"--recipe={args.recipe}",
        f"--output={output}",
        f"data.shards={args.shards}",
        f"train.max_steps={args.steps}",
        "train.log_every=1",
        *args.overrides,
    ]


if __name__ == "__main__":
    sys.exit(main())
