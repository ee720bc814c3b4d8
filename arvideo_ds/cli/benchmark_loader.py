"""How fast clips come out of the shards: clips/s per core, ms per stage, peak memory. Prints JSON.

    arvideo benchmark_loader SHARDS
    arvideo benchmark_loader SHARDS --compare VIDEOS --repeats 4
    arvideo benchmark_loader SHARDS --memory 20000 --workers 2 --cores 2

The whole path is timed, from stored bytes to the trainer's batches, on `--cores` cores, which the
main process shares. `--compare` also loads the same clips from raw files in the folder VIDEOS, as
the official VideoMAE code does: decord, one clip per decode, PIL crops, float tensors normalised on
the CPU; with the same workers, batch size and cores.
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
    parser.add_argument("shards", help="folder of the shards, or its URL")
    parser.add_argument("--compare", type=Path, metavar="VIDEOS", help="the same clips, raw files")
    parser.add_argument("--memory", type=int, metavar="CLIPS", help="growth over so many clips")
    parser.add_number("repeats", 1, "clips per decoded video")
    parser.add_number("frames", 16, "per clip")
    parser.add_number("stride", 4, "between frames")
    parser.add_number("batch", 16, "clips per batch")
    parser.add_number("workers", 1, "processes")
    parser.add_number("cores", 1, "shared by all processes")
    parser.add_number("seconds", 20.0, "of each measurement")
    parser.add_argument("--decoder", default="auto")
    parser.add_argument("--planes", action="store_true", help="as data.planes")
    args = parser.parse_args()
    cores = available_cores()[: args.cores]
    if len(cores) < args.cores:
        raise UserError(f"--cores {args.cores}, but this process may use {len(cores)}.")
    bind_to_cores(cores)
    from arvideo_ds.benchmark.loader import LoaderOptions, measure_loader

    print(json.dumps(measure_loader(from_arguments(LoaderOptions, args)), indent=1))
