"""Features of your own videos, of any length, from a trained encoder: one file per video.

    arvideo features VIDEOS --model runs/my_run --output FEATURES
    arvideo features clips.csv --videos VIDEOS --model runs/my_run \\
        --output FEATURES --features time --hop 16

INPUT is a folder of videos (searched at any depth), a .csv or .jsonl with a column `path`, a folder
of shards, or one video. docs/features.md describes the files and how to read them.
An interrupted command resumes. Exit code 3: done, but more than --max_reject_share of the videos
were rejected; rejects.jsonl gives each reason.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from arvideo_ds.arguments import (
    CommandParser,
    add_public,
    add_weights,
    from_arguments,
    require_at_least,
)
from arvideo_ds.config import EncoderRecipe
from arvideo_ds.errors import EXIT_INTERRUPTED, EXIT_MANY_REJECTS, EXIT_OK, command
from arvideo_ds.evaluation.feature_files import WRITERS, require_format
from arvideo_ds.evaluation.stop import Stop
from arvideo_ds.files.locks import lock
from arvideo_ds.host import available_cores
from arvideo_ds.runs import run_folder
from arvideo_ds.shards.inputs import list_videos
from arvideo_ds.shards.video_files import count_videos

_MAX_WORKERS = 16


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    parser.add_argument("input", metavar="INPUT")
    parser.add_argument(
        "--model", required=True, type=Path, help="a finished run or public classifier"
    )
    add_weights(parser, run_folder.WEIGHTS)
    add_public(parser, labels=False)
    parser.add_argument("--output", required=True, type=Path, help="folder of the features")
    parser.add_argument("--videos", type=Path, help="root of a list's paths; default: its folder")
    text = "count a list's wrong rows as rejects"
    parser.add_argument("--skip_bad_rows", action="store_true", help=text)
    parser.add_argument(
        "--features",
        choices=("clip", "token", "time"),
        default="clip",
        help="per window: the mean of its tokens, every token, or one mean per time",
    )
    parser.add_argument("--format", choices=list(WRITERS), default="npz")
    parser.add_argument(
        "--hop",
        type=int,
        help="frames between windows (at data.fps, if given); default: no overlap",
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_number("batch", 16, "windows per forward pass")
    workers = min(_MAX_WORKERS, len(available_cores()))
    parser.add_number("workers", workers, "processes that decode, a video each; 0: the main one")
    parser.add_number("timeout_s", 120.0, "per batch of a video")
    parser.add_number("max_reject_share", 0.05, "see exit code 3")
    return parser.parse_args()


@command
def main() -> int:
    args = parse_arguments()
    require_at_least(1, args, "batch", "timeout_s")
    require_at_least(0, args, "workers")
    require_format(args.format)
    import torch

    from arvideo_ds.evaluation.extraction import ExtractionJob, extract_features
    from arvideo_ds.evaluation.feature_folder import INDEX
    from arvideo_ds.evaluation.public import (
        PublicClassifier,
        PublicOptions,
        is_public,
        read_public,
    )

    run_folder.require_own(args.output, INDEX)
    options = PublicOptions(overrides=args.override)
    public: PublicClassifier | None = None
    if is_public(args.model):
        public = read_public(args.model, options, needs_labels=False, weights=args.weights)
        print(public, flush=True)
        recipe: EncoderRecipe = public.recipe
        weights = public.weights
    else:
        options.require_unused(args.model)
        recipe = run_folder.read_recipe(args.model, EncoderRecipe)
        weights = (
            args.model / run_folder.WEIGHTS[run_folder.choose_weights(args.model, args.weights)]
        )
    listing = list_videos(args.input, videos=args.videos, skip_bad_rows=args.skip_bad_rows)
    print(count_videos(args.input, len(listing.videos), listing.passed_over), flush=True)
    job = from_arguments(ExtractionJob, args, listing=listing)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stop = Stop()
    with lock(args.output):
        report = extract_features(recipe, weights, job, device, stop=stop.requested, public=public)
    print(
        f"{args.output}: {report.videos:,} videos ({report.new:,} of them new), "
        f"{report.windows:,} windows, {report.seconds / 3600:,.2f} h"
    )
    rejects = sum(report.rejects.values())
    if rejects:
        reasons = ", ".join(f"{count} {reason}" for reason, count in report.rejects.items())
        print(f"rejected: {rejects} ({reasons}); see {args.output / 'rejects.jsonl'}")
    if report.interrupted:
        print("interrupted; the same command continues with the other videos", flush=True)
        return EXIT_INTERRUPTED
    share = rejects / (len(listing.videos) + len(listing.rejects))
    return EXIT_MANY_REJECTS if share > args.max_reject_share else EXIT_OK
