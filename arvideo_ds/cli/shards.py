"""Turn videos into WebDataset tar shards with a manifest.

    arvideo shards --dataset folder --videos VIDEOS --output SHARDS
    arvideo shards --dataset csv --videos VIDEOS --annotations train.csv \\
        --split train --output SHARDS --video transcode
    arvideo shards --dataset kinetics400 --videos k400/train \\
        --annotations k400/annotations/train.csv --output SHARDS

docs/datasets.md says what each data set needs, docs/data.md what becomes of the videos.
Exit codes: 0 done; 2 wrong input, nothing usable; 3 done, but more than --max_reject_share of the
videos were left out (rejects.jsonl says which and why); 75 interrupted, the same command goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from arvideo_ds.arguments import (
    CommandParser,
    export_plugins,
    from_arguments,
    require_at_least,
    require_positive,
)
from arvideo_ds.decoding.decoders import HOW_TO_GET_TORCHCODEC, decisive_decoders
from arvideo_ds.decoding.video import MAX_PIXELS, TranscodeSettings
from arvideo_ds.errors import EXIT_INTERRUPTED, EXIT_MANY_REJECTS, EXIT_OK, command
from arvideo_ds.host import available_cores
from arvideo_ds.shards.datasets import READERS, Listing, Option, Source, read_listing, readers_of
from arvideo_ds.shards.video_files import describe_passed_over
from arvideo_ds.shards.writer import ShardJob, ShardReport, write_shards


def parse_arguments(options: Iterable[Option]) -> argparse.Namespace:
    defaults = TranscodeSettings()
    parser = CommandParser(description=__doc__, epilog=data_sets())
    parser.add_argument(
        "--dataset", required=True, metavar="NAME", help="kind of data set, see below"
    )
    parser.add_argument("--videos", required=True, type=Path, help="folder of the videos")
    parser.add_argument("--annotations", type=Path, help="file or folder of the data set")
    parser.add_argument("--split", help="see below")
    for option in options:
        default = "" if option.default in (None, ()) else f"; default {option.default}"
        parser.add_argument(
            f"--{option.name}",
            type=option.type,
            nargs="+" if option.several else None,
            default=argparse.SUPPRESS,
            help=f"{', '.join(readers_of(option.name))}: {option.help}{default}",
        )
    parser.add_argument(
        "--skip_bad_rows",
        action="store_true",
        help="count wrong rows as rejects; without it they stop the work",
    )
    parser.add_argument("--output", required=True, type=Path, help="folder of the shards")
    parser.add_argument(
        "--video",
        choices=("copy", "transcode"),
        default="transcode",
        help="store files as they are, or make H.264 of them; default %(default)s",
    )
    for name, value, words in (
        ("short_side", defaults.short_side, "pixels, 0 keeps"),
        ("gop", defaults.gop, "frames between key frames"),
        ("crf", defaults.crf, "x264 quality, lower is better"),
        ("max_pixels", MAX_PIXELS, "of a frame; larger videos are left out, 0: no limit"),
        ("samples_per_shard", 500, "videos"),
        ("seed", 0, "order of the videos over the shards"),
        ("workers", len(available_cores()), "processes"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=value, help=f"{words}; default %(default)s"
        )
    parser.add_argument(
        "--timeout_s", type=float, default=120, help="per video; default %(default)s"
    )
    parser.add_argument(
        "--memory_gib",
        type=float,
        default=8,
        help="what a process may allocate, 0: no limit; default %(default)s",
    )
    parser.add_argument(
        "--max_reject_share", type=float, default=0.05, help="see exit code 3; default %(default)s"
    )
    return parser.parse_args()


@command
def main() -> int:
    export_plugins(sys.argv[1:])
    options = {option.name: option for reader in READERS.values() for option in reader.options}
    args = parse_arguments(options.values())
    require_at_least(0, args, "max_pixels", "memory_gib")
    require_positive(args, "samples_per_shard", "workers", "timeout_s", "gop")
    transcode = None
    if args.video == "transcode":
        transcode = TranscodeSettings(short_side=args.short_side, gop=args.gop, crf=args.crf)
    source = Source(
        args.videos,
        args.annotations,
        args.split,
        skip_bad_rows=args.skip_bad_rows,
        **{name: value for name, value in vars(args).items() if name in options},
    )
    listing = read_listing(args.dataset, source)
    print_listing(args.dataset, listing)
    if transcode is None and "torchcodec" not in decisive_decoders():
        print(
            "note: files are copied, and checked by PyAV alone; machines on which torchcodec works "
            f"may read other frames of some. {HOW_TO_GET_TORCHCODEC}.",
            flush=True,
        )
    job = from_arguments(ShardJob, args, listing=listing, transcode=transcode)
    try:
        report = write_shards(job)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on after the last complete shard", flush=True)
        return EXIT_INTERRUPTED
    print_summary(args.output, report)
    print_passed_over(listing)
    return EXIT_MANY_REJECTS if report.share_left_out > args.max_reject_share else EXIT_OK


def data_sets() -> str:
    """The registered data sets with what they read, for the help."""
    lines = ["data sets, those of plugins included:"]
    for name, reader in READERS.items():
        given = [f"--{option.name}" for option in reader.options]
        given += [f"--split ({reader.split})"] * bool(reader.split)
        rules = ["flips refused"] * (not reader.flip)
        rules += [f"{reader.sampling} sampling"] * (reader.sampling is not None)
        rules += [f"labels: {' and '.join(reader.label_sets)}"] * bool(reader.label_sets)
        words = ["; ".join(filter(None, (", ".join(given), *rules))), reader.url]
        lines.append(f"  {name:<16}" + ("\n" + " " * 18).join(filter(None, words)))
    return "\n".join(lines)


def print_listing(dataset: str, listing: Listing) -> None:
    """What was found, before hours of work begin."""
    labels = f"{len(listing.labels)} labels" if listing.labels else "no labels"
    print(f"{dataset}: {len(listing.entries):,} videos, {labels}", flush=True)
    print_passed_over(listing)
    for note in listing.notes:
        print(f"note: {note}", flush=True)
    for reason, count in Counter(reject.reason for reject in listing.rejects).items():
        first = next(reject for reject in listing.rejects if reject.reason == reason)
        print(f"{reason}: {count:,}, such as {first.source_path} ({first.message})", flush=True)


def print_passed_over(listing: Listing) -> None:
    if listing.passed_over:
        print(f"note: {describe_passed_over(listing.passed_over)}", flush=True)


def print_summary(output: Path, report: ShardReport) -> None:
    manifest = report.manifest
    size_mib = sum(shard.bytes for shard in manifest.shards) / 2**20
    labels = f"{len(manifest.labels)} labels" if manifest.labels else "no labels"
    kept = f", {report.shards_kept} of them from an earlier run" if report.shards_kept else ""
    print(
        f"{output}: {manifest.num_samples} videos in {len(manifest.shards)} shards{kept}, "
        f"{size_mib:.1f} MiB, {labels}"
    )
    report.print_left_out(output)
