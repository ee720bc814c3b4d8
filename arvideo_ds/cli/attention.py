"""Rank of the attention maps of encoders, layer by layer (ARVideo, Figure 3): docs/attention.md.

    arvideo attention runs/demo untrained:runs/demo --shards data/demo/test \\
        --output runs/demo/attention
    arvideo attention runs/arvideo runs/videomae videomae.pth --shards SHARDS \\
        --output attention --threshold 0.1 0.01 0.001

An ENCODER is the folder of a finished run or of an export, untrained:RUN for the initial weights
of a pretraining run, or any file of weights that --init-from takes. All encode the same clips. The
recipe of the first encoder decides how clips are cut and applies to weights without a recipe.

Writes OUTPUT/attention_rank.json and .png, prints a table. Measurements are kept in OUTPUT/spectra:
an interrupted command resumes, and another threshold takes seconds.
"""

from __future__ import annotations

from pathlib import Path

from arvideo_ds.arguments import CommandParser, require_at_least
from arvideo_ds.errors import UserError, command
from arvideo_ds.files.locks import lock
from arvideo_ds.host import available_cores
from arvideo_ds.shards.manifest import ShardSet

# Far above the rounding error of float32 in a singular value, relative to the largest.
_LEAST_THRESHOLD = 1e-5


@command
def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("encoders", nargs="+", metavar="ENCODER")
    parser.add_argument("--shards", required=True, help="the clips' shards; labels do not matter")
    parser.add_argument("--output", required=True, type=Path, help="folder")
    parser.add_number("clips", 64, "spread over the shards")
    text = "singular values above this share of the largest count; default 0.01"
    parser.add_argument("--threshold", type=float, nargs="+", default=[0.01], help=text)
    parser.add_argument("--recipe", help="of weights without one; default: the first run's")
    args = parser.parse_args()
    require_at_least(1, args, "clips")
    for threshold in args.threshold:
        if not _LEAST_THRESHOLD <= threshold < 1:
            raise UserError(
                f"--threshold {threshold:g} must be below 1 and at least {_LEAST_THRESHOLD:g}: "
                "smaller singular values are rounding errors."
            )
    from arvideo_ds.data.loader import worker_count
    from arvideo_ds.evaluation import attention

    encoders = attention.open_encoders(args.encoders, args.recipe)
    attention.require_same_clips(encoders)
    shards, recipe = ShardSet(args.shards), encoders[0].recipe
    numbers = attention.evenly(shards.num_samples, min(args.clips, shards.num_samples))
    workers = worker_count(recipe, cores=len(available_cores()))
    clips = attention.Clips(shards, numbers, recipe, workers)
    with lock(args.output):
        measured = attention.measure(encoders, clips, args.output / "spectra")
        attention.write_report(args.output, encoders, clips, measured, args.threshold)
