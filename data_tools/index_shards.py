#!/usr/bin/env python3
"""Use WebDataset tars that somebody else made: an index beside each, nothing copied.

    python data_tools/index_shards.py TARS
    python scripts/pretrain.py ... data.shards=TARS

Every video (mp4, webm, avi, mkv, mov) is decoded once, in processes with a time limit; what
training could not read stands in rejects.jsonl. Labels are the number in `<key>.cls`, or `label` in
`<key>.json`. Run again to go on after an interruption.
Exit codes: 0 done; 2 wrong input, such as a damaged tar; 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from arvideo_ds.data.foreign import index_shards
from arvideo_ds.errors import EXIT_OK, UserError, command

EXIT_INTERRUPTED = 130


@command
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shards", type=Path, help="folder of the tars")
    parser.add_argument("--dataset", default="webdataset", help="ssv2 is never flipped, and so on")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--timeout_s", type=float, default=120, help="per video")
    args = parser.parse_args()
    for name in ("workers", "timeout_s"):
        if getattr(args, name) <= 0:
            raise UserError(f"--{name} {getattr(args, name)} must be above 0.")
    try:
        manifest = index_shards(
            args.shards, dataset=args.dataset, workers=args.workers, timeout_s=args.timeout_s
        )
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on after the last indexed tar", flush=True)
        return EXIT_INTERRUPTED
    print(
        f"{args.shards}: {manifest.num_samples} videos in {len(manifest.shards)} tars, "
        f"{manifest.num_rejects} left out (rejects.jsonl)"
    )
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
