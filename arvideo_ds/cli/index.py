"""Use WebDataset tars that somebody else made: an index beside each, nothing copied.

    arvideo index TARS
    arvideo pretrain ... data.shards=TARS

Every video (mp4, webm, avi, mkv, mov) is decoded once, in processes with a time limit; what
training could not read is listed in rejects.jsonl. Labels are the number or name in `<key>.cls`, or
`label` in `<key>.json`; names are numbered in sorted order, or as in --labels.
Exit codes: 0 done; 2 wrong input, such as a damaged tar, or nothing usable; 3 done, but more than
--max_reject_share of the videos were left out; 75 interrupted, the same command goes on.
"""

from __future__ import annotations

from pathlib import Path

from arvideo_ds.arguments import CommandParser, require_positive
from arvideo_ds.errors import EXIT_INTERRUPTED, EXIT_MANY_REJECTS, EXIT_OK, command
from arvideo_ds.host import available_cores
from arvideo_ds.shards.foreign import index_shards


@command
def main() -> int:
    parser = CommandParser(description=__doc__)
    parser.add_argument("shards", type=Path, help="folder of the tars")
    parser.add_argument(
        "--dataset",
        default="webdataset",
        help="ssv2 is never flipped, and so on; default %(default)s",
    )
    parser.add_argument("--labels", type=Path, help="file of class names, in order")
    parser.add_argument(
        "--workers", type=int, default=len(available_cores()), help="processes; default %(default)s"
    )
    parser.add_argument(
        "--timeout_s", type=float, default=120, help="per video; default %(default)s"
    )
    parser.add_argument(
        "--max_reject_share", type=float, default=0.05, help="see exit code 3; default %(default)s"
    )
    args = parser.parse_args()
    require_positive(args, "workers", "timeout_s")
    try:
        report = index_shards(
            args.shards,
            dataset=args.dataset,
            workers=args.workers,
            timeout_s=args.timeout_s,
            labels=args.labels,
        )
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on after the last indexed tar", flush=True)
        return EXIT_INTERRUPTED
    manifest = report.manifest
    labels = f"{len(manifest.labels)} labels" if manifest.labels else "no labels"
    kept = f", {report.shards_kept} of them indexed before" if report.shards_kept else ""
    print(
        f"{args.shards}: {manifest.num_samples} videos in {len(manifest.shards)} tars{kept}, "
        f"{labels}"
    )
    report.print_left_out(args.shards)
    return EXIT_MANY_REJECTS if report.share_left_out > args.max_reject_share else EXIT_OK
