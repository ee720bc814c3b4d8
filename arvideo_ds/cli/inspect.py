"""Show what shards contain: a table, histograms and a contact sheet.

    arvideo inspect SHARDS
    arvideo inspect SHARDS --output DIR

Prints the table; with --output, writes histograms.png and videos.png to that folder.
"""

from __future__ import annotations

from pathlib import Path

from arvideo_ds.arguments import CommandParser, require_positive
from arvideo_ds.config.schema import DataSettings
from arvideo_ds.errors import command
from arvideo_ds.files.locks import make_folder
from arvideo_ds.host import available_cores
from arvideo_ds.shards.inspection import format_rows, inspect_shards, table, thumbnails


@command
def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("shards", type=Path, help="folder of the shards")
    parser.add_argument("--output", type=Path, help="folder of the pictures; default: no pictures")
    parser.add_number("num_videos", 24, "on the contact sheet")
    parser.add_number("seed", 0, "chooses those videos")
    parser.add_number("workers", len(available_cores()), "processes")
    parser.add_number("clip_frames", DataSettings().frames, "shorter videos are counted")
    args = parser.parse_args()
    require_positive(args, "num_videos", "workers", "clip_frames")
    if args.output is not None:
        make_folder(args.output)
    found = inspect_shards(args.shards)
    print(format_rows(table(found, clip_frames=args.clip_frames)))
    if args.output is None:
        return
    from arvideo_ds.shards.inspection_pictures import draw_contact_sheet, draw_histograms

    frames = thumbnails(args.shards, args.num_videos, seed=args.seed, workers=args.workers)
    for name, figure in (
        ("histograms.png", draw_histograms(found)),
        ("videos.png", draw_contact_sheet(frames, found)),
    ):
        figure.savefig(args.output / name, dpi=150)
        print(f"{args.output / name}")
