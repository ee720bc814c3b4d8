"""Use existing WebDataset tars: write an index beside each, copy nothing.

    arvideo index TARS
    arvideo pretrain ... data.shards=TARS

Every video (mp4, webm, avi, mkv, mov) is decoded once, in processes with a time limit; unreadable
ones are listed in rejects.jsonl. Labels are the number or name in `<key>.cls`, or `label` in
`<key>.json`; names are numbered in sorted order, or as in --labels. An interrupted command resumes.
Exit code 3: done, but more than --max_reject_share of the videos were rejected.
"""

from __future__ import annotations

from pathlib import Path

from arvideo_ds.arguments import CommandParser, from_arguments, require_positive
from arvideo_ds.cli import end_with_rejects
from arvideo_ds.errors import command
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
    parser.add_number("workers", len(available_cores()), "processes")
    parser.add_number("timeout_s", 120.0, "per video")
    parser.add_number("max_reject_share", 0.05, "see exit code 3")
    args = parser.parse_args()
    require_positive(args, "workers", "timeout_s")
    report = from_arguments(index_shards, args, folder=args.shards)
    return end_with_rejects(args.shards, report, args.max_reject_share, "tars")
