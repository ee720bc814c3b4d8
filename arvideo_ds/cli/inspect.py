"""Show what shards hold: a table, histograms and a contact sheet.

    arvideo inspect SHARDS
    arvideo inspect SHARDS --output DIR

The table goes to the terminal; with --output, histograms.png and videos.png go to that folder.
Exit codes: 0 done; 2 wrong input, or a shard is damaged.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from arvideo_ds.arguments import CommandParser, require_positive
from arvideo_ds.config.schema import DataSettings
from arvideo_ds.errors import command
from arvideo_ds.files.locks import make_folder
from arvideo_ds.host import available_cores
from arvideo_ds.shards.inspection import format_rows, inspect_shards, table, thumbnails

_DPI = 150


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    parser.add_argument("shards", type=Path, help="folder of the shards")
    parser.add_argument("--output", type=Path, help="folder of the pictures; without it, none")
    for name, value, words in (
        ("num_videos", 24, "on the contact sheet"),
        ("seed", 0, "chooses those videos"),
        ("workers", len(available_cores()), "processes"),
        ("clip_frames", DataSettings().frames, "data.frames: shorter videos are counted"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=value, help=f"{words}; default %(default)s"
        )
    return parser.parse_args()


@command
def main() -> None:
    args = parse_arguments()
    require_positive(args, "num_videos", "workers", "clip_frames")
    if args.output is not None:
        make_folder(args.output)
    found = inspect_shards(args.shards)
    print(format_rows(table(found, clip_frames=args.clip_frames)))
    if args.output is None:
        return
    # matplotlib takes its time; a table alone should not wait for it.
    from arvideo_ds.shards.inspection_pictures import draw_contact_sheet, draw_histograms

    frames = thumbnails(args.shards, args.num_videos, seed=args.seed, workers=args.workers)
    for name, figure in (
        ("histograms.png", draw_histograms(found)),
        ("videos.png", draw_contact_sheet(frames, found)),
    ):
        figure.savefig(args.output / name, dpi=_DPI)
        print(f"{args.output / name}")
