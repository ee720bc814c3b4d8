"""Score every token of a shard set once, for pretraining with data.scores.

    arvideo score_tokens --shards SHARDS --scorer flow
    torchrun --nproc_per_node 8 -m arvideo_ds score_tokens --scorer tokenizer --tokenizer RUN \\
        --recipe lvmae_vit_b_diving48 data.shards=SHARDS             also deepspeed, srun

Stride, size and patch come from --recipe (with overrides), or from their own options. Writes one
file per shard to SHARDS/scores/NAME; ranks share the shards, and the last one writes scores.json.
Ctrl-C or SIGTERM finishes the current videos; the same command continues with the others. See
docs/long_video.md. Exit code 3: some videos hung or died and have no scores yet, see
--leave_out_failed.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

from arvideo_ds.arguments import (
    CommandParser,
    add_overrides,
    add_rank,
    from_arguments,
    require_at_least,
    require_positive,
)
from arvideo_ds.config import Recipe, TokenizerRecipe, load_recipe
from arvideo_ds.errors import EXIT_INTERRUPTED, EXIT_MANY_REJECTS, EXIT_OK, UserError, command
from arvideo_ds.evaluation.stop import Stop
from arvideo_ds.files.locks import lock
from arvideo_ds.geometry import Geometry, Triple
from arvideo_ds.long_video.score_store import SCORES, ScoreContents
from arvideo_ds.long_video.scorers import SCORERS, make_scorer, scorer_name
from arvideo_ds.runs import run_folder
from arvideo_ds.shards.manifest import ShardSet

_STRIDE, _SIZE, _PATCH = 4, (224, 224), (2, 16, 16)
_MAX_WORKERS = 16
# Videos that are listed by key.
_LISTED = 5


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--shards", help="default: data.shards of the recipe")
    parser.add_argument("--scorer", required=True, type=scorer_name, help=" | ".join(SCORERS))
    parser.add_argument("--tokenizer", help="run of `arvideo tokenizer`, or its weights")
    parser.add_argument("--recipe", metavar="NAME|PATH", help="what is to be pretrained")
    parser.add_argument("--stride", type=int, help=f"without --recipe; default {_STRIDE}")
    sizes = f"default {_SIZE[0]} (or rows, columns)"
    parser.add_argument("--size", type=int, nargs="+", metavar="PIXELS", help=sizes)
    axes = ("FRAMES", "ROWS", "COLUMNS")
    parser.add_argument("--patch", type=int, nargs=3, metavar=axes, help="default 2 16 16")
    parser.add_argument("--output", type=Path, help="default SHARDS/scores/SCORER")
    parser.add_argument("--decoder", default="auto", help="as data.decoder")
    parser.add_argument("--workers", type=int, help="decoding processes per rank; default: cores")
    parser.add_number("timeout_s", 120.0, "longest time between windows of a video")
    text = "record videos that hang or die twice as without scores"
    parser.add_argument("--leave_out_failed", action="store_true", help=text)
    add_rank(parser)
    add_overrides(parser)
    return parser.parse_intermixed_args()


@command
def main() -> int:
    args = parse_arguments()
    recipe = None if args.recipe is None else load_recipe(args.recipe, args.overrides, Recipe)
    stride, size, patch = clip_shape(args, recipe)
    where = args.shards or (recipe and recipe.data.shards)
    if not where:
        raise UserError("there are no shards to score: give --shards SHARDS.")
    require_tokenizer(args.tokenizer)
    shards = ShardSet(where)
    shards.check_sizes()
    output = output_folder(args, shards)
    run_folder.require_own(output, SCORES)
    require_at_least(0, args, "workers")
    require_positive(args, "timeout_s")
    stop = Stop()
    import torch

    from arvideo_ds.decoding.decoders import choose_decoder
    from arvideo_ds.engine.world import find_world
    from arvideo_ds.long_video.scoring_pass import ScoringJob, score_shards

    world = find_world()
    # On a CPU the workers are the parallelism, and one thread each gives one result.
    torch.set_num_threads(1)
    scorer = make_scorer(args.scorer, patch, tokenizer=args.tokenizer, device=str(world.device))
    job = from_arguments(
        ScoringJob,
        args,
        shards=shards,
        scorer=scorer,
        output=output,
        decoder=choose_decoder(args.decoder),
        stride=stride,
        size=size,
        patch=patch,
        workers=min(_MAX_WORKERS, world.cores) if args.workers is None else args.workers,
        rank=world.rank,
        num_ranks=world.size,
    )
    if world.is_main:
        print(
            f"{shards.name}: {shards.num_samples:,} videos in {len(shards.manifest.shards):,} "
            f"shards, {world.size} rank(s) x {job.workers} worker(s), scorer {args.scorer} on "
            f"{world.device if scorer.on_device else 'cpu'}",
            flush=True,
        )
    with lock(output, "" if world.is_main else f"-{world.rank}"):
        report = score_shards(job, stop=stop.requested)
    if report.failed:
        print(f"hung or died twice: {len(report.failed)} ({_listed(report.failed)})", flush=True)
    if report.interrupted:
        print("interrupted; the same command continues with the other videos", flush=True)
        return EXIT_INTERRUPTED
    if report.lacking:
        print_lacking(report.lacking)
        return EXIT_MANY_REJECTS
    if report.contents is not None:
        print_summary(output, report.contents, report.new_videos)
    else:
        print(
            f"rank {world.rank} of {world.size} is done, others are not; the last one writes "
            f"{SCORES}. If one has died, run the same command again.",
            flush=True,
        )
    return EXIT_OK


def clip_shape(
    args: argparse.Namespace, recipe: Recipe | None
) -> tuple[int, tuple[int, int], Triple]:
    """Stride, size and patch. Errors: `UserError` where they are invalid or given twice."""
    if recipe is not None:
        for name in ("stride", "size", "patch"):
            if getattr(args, name) is not None:
                raise UserError(f"--recipe already gives the {name}; remove --{name}.")
        if recipe.data.stride is None:
            raise UserError(
                f"data.fps={recipe.data.fps:g}, but the scored tokens of a video are frames of one "
                "stride. Give the recipe data.stride instead."
            )
        return recipe.data.stride, recipe.data.size, recipe.patch
    if args.overrides:
        raise UserError(f"'{args.overrides[0]}' is a setting of a recipe; give --recipe as well.")
    require_at_least(1, args, "stride")
    sides = args.size or _SIZE
    if len(sides) > 2:
        raise UserError(f"--size takes one number or two, rows and columns, not {len(sides)}.")
    size = (sides[0], sides[-1])
    frames, rows, columns = args.patch or _PATCH
    patch = (frames, rows, columns)
    if frames < 1:
        raise UserError(f"--patch {list(patch)}: a token has at least one frame.")
    Geometry.whole((frames, *size), patch)
    return args.stride or _STRIDE, size, patch


def require_tokenizer(path: str | None) -> None:
    """Errors: `UserError` where the weights belong to a run of another task."""
    if path is not None and Path(path).exists():
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        run_folder.read_recipe(folder, TokenizerRecipe)


def output_folder(args: argparse.Namespace, shards: ShardSet) -> Path:
    if args.output is not None:
        return Path(args.output)
    if "://" in shards.name:
        raise UserError(f"{shards.name} is not a folder of this machine; give --output FOLDER.")
    return Path(shards.name) / "scores" / str(args.scorer)


def print_lacking(keys: list[str]) -> None:
    listed = ", ".join(keys[:_LISTED]) + ", ..." * (len(keys) > _LISTED)
    print(
        f"{len(keys):,} video(s) have no scores yet, because they hung or died or a rank was "
        f"interrupted: {listed}. The same command tries only these, perhaps on a less busy "
        "machine or with a longer --timeout_s; --leave_out_failed records those that hang or die "
        "again as videos without scores.",
        flush=True,
    )


def print_summary(output: Path, contents: ScoreContents, new_videos: int) -> None:
    """new_videos: scored by this rank in this run."""
    size = sum(file.bytes for file in contents.files) / 2**20
    print(
        f"{output}: {contents.num_videos:,} videos in {len(contents.files):,} files, "
        f"{size:,.1f} MiB ({new_videos:,} videos scored now by this rank)"
    )
    if unreadable := contents.unreadable:
        print(f"without scores: {len(unreadable)} ({_listed(unreadable)}); see {SCORES}")
    print(f"pretrain with data.scores={output} data.crop=grid", flush=True)


def _listed(videos: Mapping[str, str]) -> str:
    return "; ".join(f"{key}: {why}" for key, why in islice(videos.items(), _LISTED))
