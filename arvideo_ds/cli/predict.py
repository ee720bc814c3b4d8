"""Label videos with a fine-tuned model: one line per video, most likely labels first.

    arvideo predict a.mp4 FOLDER --model runs/my_finetuning
    a.mp4   wave 0.912   clap 0.044   nod 0.017

The model is a fine-tuned run, its export with --format encoder, a folder of transformers'
VideoMAEForVideoClassification, or a fine-tuned .pth of VideoMAE or VideoMAE V2 with --labels.
Scores are probabilities.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from arvideo_ds.arguments import CommandParser, add_public, add_weights, require_at_least
from arvideo_ds.cli import log
from arvideo_ds.config import FinetuneRecipe
from arvideo_ds.errors import UserError, command
from arvideo_ds.runs import run_folder
from arvideo_ds.shards.video_files import count_videos, find_videos


@command
def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("videos", type=Path, nargs="+", metavar="VIDEO", help="files, or folders")
    parser.add_argument("--model", type=Path, required=True, help="folder, see above")
    add_weights(parser, run_folder.WEIGHTS)
    parser.add_number("top", 5, "labels per video")
    add_public(parser)
    args = parser.parse_args()
    require_at_least(1, args, "top")
    import torch

    from arvideo_ds.evaluation.predictions import central_clip, top_labels
    from arvideo_ds.evaluation.public import PublicOptions
    from arvideo_ds.exports.source import open_model

    public = PublicOptions(args.labels, args.override)
    source = open_model(args.model, FinetuneRecipe, weights=args.weights, public=public)
    if source.public is not None:
        log(str(source.public))
    model, labels, data = source.classifier, source.class_names, source.recipe.data
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    videos, failed = list(files(args.videos)), 0
    for path in videos:
        try:
            best = top_labels(model, labels, central_clip(path, data), args.top)
        except UserError as error:
            failed += 1
            log(f"skipped: {error}")
        else:
            print("   ".join([str(path), *(f"{name} {p:.3f}" for name, p in best)]), flush=True)
    if failed:
        raise UserError(f"{failed} of {len(videos)} videos could not be read; see above.")


def files(paths: Iterable[Path]) -> Iterator[Path]:
    """The given files, and the videos below the given folders."""
    for path in paths:
        skipped = Counter[str]()
        videos = list(find_videos(path, skipped)) if path.is_dir() else [path]
        if skipped:
            log(count_videos(str(path), len(videos), skipped))
        if not videos:
            raise UserError(f"there are no videos in {path}.")
        yield from videos
