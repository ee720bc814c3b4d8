"""Turn videos into WebDataset tar shards with a manifest.

    arvideo shards --dataset folder --videos VIDEOS --output SHARDS
    arvideo shards --dataset csv --videos VIDEOS --annotations train.csv \\
        --split train --output SHARDS --video transcode
    arvideo shards --dataset kinetics400 --videos k400/train \\
        --annotations k400/annotations/train.csv --output SHARDS
    srun --nodes 8 arvideo shards ... --output SHARDS --part slurm

docs/datasets.md lists what each data set needs, docs/data.md how videos are stored, and how several
machines share the work.
An interrupted command resumes. Exit code 3: done, but more than --max_reject_share of the videos
were rejected; rejects.jsonl gives each reason.
"""

from __future__ import annotations

import argparse
import signal
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
from arvideo_ds.cli import end_with_rejects
from arvideo_ds.decoding.decoders import HOW_TO_GET_TORCHCODEC, decisive_decoders
from arvideo_ds.decoding.video import MAX_LAYERS, MAX_PIXELS, TranscodeSettings
from arvideo_ds.errors import EXIT_OK, UserError, command
from arvideo_ds.host import available_cores
from arvideo_ds.shards.datasets import READERS, Listing, Option, Source, read_listing, readers_of
from arvideo_ds.shards.parts import Part, parse_part
from arvideo_ds.shards.video_files import describe_passed_over
from arvideo_ds.shards.writer import (
    PartReport,
    ShardJob,
    finish_parts,
    print_damaged,
    write_part,
    write_shards,
)


def parse_arguments(options: Iterable[Option]) -> argparse.Namespace:
    defaults = TranscodeSettings()
    parser = CommandParser(description=__doc__, epilog=data_sets())
    parser.add_argument("--dataset", required=True, metavar="NAME", help="see below")
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
    text = "count wrong rows as rejects, do not stop"
    parser.add_argument("--skip_bad_rows", action="store_true", help=text)
    parser.add_argument("--output", required=True, type=Path, help="folder of the shards")
    parser.add_argument(
        "--video",
        choices=("copy", "transcode"),
        default="transcode",
        help="store files as they are, or make H.264 of them; default %(default)s",
    )
    parser.add_number("short_side", defaults.short_side, "pixels, 0 keeps")
    text = (
        "only every N-th picture is one that others refer to, so that a clip of stride N decodes "
    )
    text += "fewer pictures; 1: all; default the stride of the data set, see below"
    parser.add_argument("--layers", type=int, metavar="N", help=text)
    text = f"frames between key frames; default {defaults.gop}, with layers {defaults.gop} x N"
    parser.add_argument("--gop", type=int, metavar="N", help=text)
    parser.add_number("crf", defaults.crf, "x264 quality, lower is better")
    parser.add_number("max_pixels", MAX_PIXELS, "of a frame; rejects larger videos, 0: no limit")
    parser.add_number("samples_per_shard", 500, "videos")
    parser.add_number("seed", 0, "order of the videos over the shards")
    parser.add_number("workers", len(available_cores()), "processes")
    parser.add_number("timeout_s", 120.0, "per video")
    parser.add_number("memory_gib", 8.0, "what a process may allocate, 0: no limit")
    parser.add_number("max_reject_share", 0.05, "see exit code 3")
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument(
        "--part",
        type=parse_part,
        metavar="I/N",
        help="write part I of N, from 1/N to N/N, beside the others; slurm: as many parts as srun "
        "has tasks. The last part to end writes the manifest",
    )
    text = "write no shards, only the manifest: all parts must be complete"
    parts.add_argument("--finish", action="store_true", help=text)
    return parser.parse_args()


@command
def main() -> int:
    # As Ctrl-C: partial files are removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    export_plugins(sys.argv[1:])
    options = {option.name: option for reader in READERS.values() for option in reader.options}
    args = parse_arguments(options.values())
    require_at_least(0, args, "max_pixels", "memory_gib")
    require_positive(args, "samples_per_shard", "workers", "timeout_s")
    given = {name: value for name, value in vars(args).items() if name in options}
    listing = read_listing(args.dataset, from_arguments(Source, args, **given))
    transcode = transcode_settings(args) if args.video == "transcode" else None
    print_listing(args.dataset, listing)
    if transcode is None and "torchcodec" not in decisive_decoders():
        print(
            "note: files are copied, and checked by PyAV alone; machines on which torchcodec works "
            f"may read other frames of some. {HOW_TO_GET_TORCHCODEC}.",
            flush=True,
        )
    job = from_arguments(ShardJob, args, listing=listing, transcode=transcode)
    if args.part:
        done = write_part(job, args.part)
        print_part(args.output, args.part, done, len(job.shard_names))
        report = done.whole
    else:
        report = finish_parts(job) if args.finish else write_shards(job)
    if report is None:
        return EXIT_OK
    print_passed_over(listing)
    return end_with_rejects(args.output, report, args.max_reject_share, "shards")


def transcode_settings(args: argparse.Namespace) -> TranscodeSettings:
    """Errors: `UserError` where the layers do not fit the key frames."""
    layers = READERS[args.dataset].stride if args.layers is None else args.layers
    gop = TranscodeSettings.gop * layers if args.gop is None else args.gop
    if not 1 <= layers <= MAX_LAYERS or gop < 1 or gop % layers:
        raise UserError(
            f"--layers {layers} --gop {gop}: layers must be 1 to {MAX_LAYERS}, and gop a positive "
            "multiple of them, so that every key frame is on the layer."
        )
    return TranscodeSettings(short_side=args.short_side, gop=gop, layers=layers, crf=args.crf)


def print_part(folder: Path, part: Part, done: PartReport, num_shards: int) -> None:
    """Counts of a part, and of all parts."""
    samples = sum(len(index.samples) for index in done.indices.values())
    rejects = sum(len(index.rejects) for index in done.indices.values())
    kept = f", {done.shards_kept} of them from an earlier run" if done.shards_kept else ""
    print(
        f"{folder}: part {part} is complete: {samples:,} videos in {len(done.indices):,} shards"
        f"{kept}; rejected: {rejects:,}; all parts: {num_shards - done.num_missing:,} of "
        f"{num_shards:,} shards",
        flush=True,
    )
    if not done.whole:
        print_damaged(done.damaged)


def data_sets() -> str:
    """The registered data sets and what they read, for the help."""
    lines = ["data sets, including plugins:"]
    for name, reader in READERS.items():
        given = [f"--{option.name}" for option in reader.options]
        given += [f"--split ({reader.split})"] * bool(reader.split)
        rules = ["flips refused"] * (not reader.flip)
        rules += [f"{reader.sampling} sampling"] * (reader.sampling is not None)
        rules += [f"stride {reader.stride}"]
        rules += [f"labels: {' and '.join(reader.label_sets)}"] * bool(reader.label_sets)
        words = ["; ".join(filter(None, (", ".join(given), *rules))), reader.url]
        lines.append(f"  {name:<16}" + ("\n" + " " * 18).join(filter(None, words)))
    return "\n".join(lines)


def print_listing(dataset: str, listing: Listing) -> None:
    """Counts of the input, before hours of work begin."""
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
