"""Features of your own videos, of any length, from a trained encoder: one file per video.

    arvideo features VIDEOS --model runs/my_run --output FEATURES
    arvideo features clips.csv --videos VIDEOS --model runs/my_run \\
        --output FEATURES --features time --hop 16

INPUT is a folder of videos (searched at any depth), a .csv or .jsonl with a column `path`, a folder
of shards, or one video. docs/features.md says what is written and how to read it.
Exit codes: 0 done; 2 wrong input, nothing usable; 3 done, but more than --max_reject_share of the
videos were left out (rejects.jsonl says which and why); 75 interrupted, the same command goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from arvideo_ds.arguments import CommandParser, add_weights, from_arguments, require_at_least
from arvideo_ds.config import EncoderRecipe
from arvideo_ds.errors import EXIT_INTERRUPTED, EXIT_MANY_REJECTS, EXIT_OK, command
from arvideo_ds.evaluation.feature_files import WRITERS, require_format
from arvideo_ds.evaluation.stop import Stop
from arvideo_ds.files.locks import lock
from arvideo_ds.host import available_cores
from arvideo_ds.runs import run_folder
from arvideo_ds.shards.inputs import list_videos
from arvideo_ds.shards.video_files import count_videos

if TYPE_CHECKING:
    from arvideo_ds.evaluation.extraction import ExtractionReport

_MAX_WORKERS = 16


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    parser.add_argument("input", metavar="INPUT")
    parser.add_argument("--model", required=True, type=Path, help="folder of a finished run")
    add_weights(parser, run_folder.WEIGHTS)
    parser.add_argument("--output", required=True, type=Path, help="folder of the features")
    parser.add_argument("--videos", type=Path, help="where a list's paths begin; default: its own")
    parser.add_argument(
        "--skip_bad_rows", action="store_true", help="count a list's wrong rows as rejects"
    )
    parser.add_argument(
        "--features",
        choices=("clip", "token", "time"),
        default="clip",
        help="per window: the mean of its tokens, every token, or one mean per time",
    )
    parser.add_argument("--format", choices=list(WRITERS), default="npz")
    parser.add_argument(
        "--hop", type=int, help="frames between windows; default: windows that touch"
    )
    parser.add_argument("--batch", type=int, default=16, help="windows per forward pass")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument(
        "--workers",
        type=int,
        default=min(_MAX_WORKERS, len(available_cores())),
        help="processes that decode, a video each; 0: the main one",
    )
    parser.add_argument("--timeout_s", type=float, default=120, help="per batch of a video")
    parser.add_argument("--max_reject_share", type=float, default=0.05)
    return parser.parse_args()


@command
def main() -> int:
    args = parse_arguments()
    require_at_least(1, args, "batch", "timeout_s")
    require_at_least(0, args, "workers")
    require_format(args.format)
    # Only now: torch takes seconds to load.
    import torch

    from arvideo_ds.evaluation.extraction import ExtractionJob, extract_features
    from arvideo_ds.evaluation.feature_folder import INDEX

    run_folder.require_own(args.output, INDEX)
    recipe = run_folder.read_recipe(args.model, EncoderRecipe)
    weights = run_folder.WEIGHTS[run_folder.choose_weights(args.model, args.weights)]
    listing = list_videos(args.input, videos=args.videos, skip_bad_rows=args.skip_bad_rows)
    print(count_videos(args.input, len(listing.videos), listing.passed_over), flush=True)
    job = from_arguments(ExtractionJob, args, listing=listing)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stop = Stop()
    with lock(args.output):
        report = extract_features(recipe, args.model / weights, job, device, stop=stop.asked)
    print_summary(args.output, report)
    if report.interrupted:
        print("interrupted; the same command goes on with the other videos", flush=True)
        return EXIT_INTERRUPTED
    rejects = sum(report.rejects.values())
    share = rejects / (len(listing.videos) + len(listing.rejects))
    return EXIT_MANY_REJECTS if share > args.max_reject_share else EXIT_OK


def print_summary(output: Path, report: ExtractionReport) -> None:
    print(
        f"{output}: {report.videos:,} videos ({report.new:,} of them new), {report.windows:,} "
        f"windows, {report.seconds / 3600:,.2f} h"
    )
    if report.rejects:
        reasons = ", ".join(f"{count} {reason}" for reason, count in report.rejects.items())
        total = sum(report.rejects.values())
        print(f"left out: {total} ({reasons}); see {output / 'rejects.jsonl'}")
