"""How fast clips come out of the shards: clips/s per core, ms per stage, peak memory. Prints JSON.

    arvideo benchmark_loader SHARDS
    arvideo benchmark_loader SHARDS --compare VIDEOS --repeats 4
    arvideo benchmark_loader SHARDS --memory 20000 --workers 2 --cores 2

The whole path is timed: stored bytes -> batches handed to the trainer, all of it on `--cores`
cores, this process's share included. `--compare` also loads the folder VIDEOS, the same clips as
downloaded, the way the official VideoMAE code does: decord on the raw file, one clip per decode,
PIL crops, float tensors normalised on the CPU; same run, workers, batch size and cores.
"""

from __future__ import annotations

import json
from pathlib import Path

from arvideo_ds.arguments import CommandParser, from_arguments
from arvideo_ds.errors import UserError, command
from arvideo_ds.host import available_cores, bind_to_cores


@command
def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--compare", type=Path, metavar="VIDEOS", help="the same clips, raw files")
    parser.add_argument("--memory", type=int, metavar="CLIPS", help="growth over so many clips")
    parser.add_argument("--repeats", type=int, default=1, help="clips per decoded video")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--stride", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16, help="clips per batch")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--cores", type=int, default=1, help="cores that all processes share")
    parser.add_argument("--seconds", type=float, default=20, help="of each measurement")
    parser.add_argument("--decoder", default="auto")
    args = parser.parse_args()
    cores = available_cores()[: args.cores]
    if len(cores) < args.cores:
        raise UserError(f"--cores {args.cores}, but this process may use {len(cores)}.")
    bind_to_cores(cores)
    # Only now: torch takes seconds to load.
    from arvideo_ds.benchmark.loader import LoaderOptions, measure_loader

    print(json.dumps(measure_loader(from_arguments(LoaderOptions, args)), indent=1))
