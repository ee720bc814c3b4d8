"""Measure a tokenizer that `arvideo tokenizer` trained: reconstruction, codes, a picture.

    arvideo evaluate_tokenizer runs/tokenizer_demo --motion 200
    arvideo evaluate_tokenizer RUN --weights best evaluation.shards=TEST

Writes RUN/tokenizer.json (PSNR, SSIM, codes in use of the central clips) and RUN/tokenizer.png.
--motion N: on N test videos of the demo, whose moving shape has a known place, the share of the
shape among the 15 % most important tokens, for the trained and for the untrained tokenizer.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from arvideo_ds.arguments import CommandParser, add_overrides, require_at_least
from arvideo_ds.config import TokenizerRecipe, load_recipe
from arvideo_ds.errors import UserError, command
from arvideo_ds.files.atomic import write_json
from arvideo_ds.runs import run_folder
from arvideo_ds.shards.manifest import ShardSet

REPORT, PICTURE = "tokenizer.json", "tokenizer.png"


@command
def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run of `arvideo tokenizer`")
    text = "default: the average, else the last"
    parser.add_argument("--weights", choices=run_folder.WEIGHTS, help=text)
    parser.add_argument("--motion", type=int, metavar="N", help="locate the moving shape, N videos")
    parser.add_number("pictures", 3, "clips in the picture")
    add_overrides(parser)
    args = parser.parse_intermixed_args()
    require_at_least(1, args, "motion")
    run_folder.read_recipe(args.run, TokenizerRecipe)
    recipe = load_recipe(str(args.run / run_folder.RECIPE), args.overrides, TokenizerRecipe)
    where = recipe.evaluation.shards
    if where is None:
        raise UserError("evaluation.shards is missing: give the videos to reconstruct.")
    shards = ShardSet(where)
    weights = args.weights or ("ema" if (args.run / run_folder.EMA_MODEL).is_file() else "last")
    run_folder.choose_weights(args.run, weights)
    from arvideo_ds.data.clips import EvaluationClips
    from arvideo_ds.evaluation.pictures import draw_rows
    from arvideo_ds.long_video.quality import judge_run, picture_rows
    from arvideo_ds.long_video.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(args.run / run_folder.WEIGHTS[weights])
    # First, because it refuses clips that are longer than its videos.
    shares = {} if args.motion is None else {"motion": shape_shares(tokenizer, recipe, args.motion)}
    quality = judge_run(tokenizer, shards, recipe)
    print(
        f"{quality.videos} clips: PSNR {quality.psnr_db:.2f} dB, SSIM {quality.ssim:.3f}; "
        f"{quality.different_codes} different codes, {100 * quality.code_usage:.1f} % of the "
        "possible ones"
    )
    facts = {"weights": weights, "shards": where, **dataclasses.asdict(quality), **shares}
    write_json(args.run / REPORT, facts)
    clips = EvaluationClips(shards, recipe)
    # From all shards, which may be sorted by class.
    step = max(1, len(clips) // max(1, args.pictures))
    shown = [clips[n].clips[0] for n in range(0, len(clips), step)][: args.pictures]
    if shown:
        title = f"{args.run.name}, {weights}: central clips of {where}"
        rows = [row for clip in shown for row in picture_rows(tokenizer, clip)]
        draw_rows(rows, title).savefig(args.run / PICTURE, dpi=110)
    print(f"{args.run / REPORT}, {PICTURE}")


def shape_shares(tokenizer: Any, recipe: TokenizerRecipe, videos: int) -> dict[str, Any]:
    """Share of the moving shape among the important tokens, before and after training; printed."""
    from arvideo_ds.long_video.quality import object_share, untrained

    result: dict[str, Any] = {"videos": videos}
    for name, model in (("trained", tokenizer), ("untrained", untrained(recipe))):
        share = object_share(model, recipe, videos=videos)
        result[name] = dataclasses.asdict(share)
        print(
            f"{name}: {100 * share.chosen:.1f} % of the 15 % most important tokens are the "
            f"shape's, {100 * share.all:.1f} % of all: {share.times_random:.2f} times random choice"
        )
    return result
