"""Test a fine-tuned run, or a public classifier: every video once, several views of each.

    arvideo evaluate runs/finetune_vit_b_k400
    torchrun --nproc_per_node 8 -m arvideo_ds evaluate RUN --shards /data/k400-val --views 5x3
    arvideo evaluate RUN --weights ema
    arvideo evaluate --model vit_b_k400.pth --labels label_map_k400.txt --shards /data/k400-val

Any number of ranks. Views are temporal x spatial, averaged after the softmax. Writes to
RUN/evaluation/: the result as JSON, every video's probabilities as safetensors, and the confusion
matrix as a picture. Unreadable videos are listed and counted.

A public classifier is a folder of transformers' VideoMAEForVideoClassification, or a fine-tuned
.pth of VideoMAE or VideoMAE V2; its settings are printed and recorded (docs/finetuning.md).
"""

from __future__ import annotations

from pathlib import Path

from arvideo_ds.arguments import (
    CommandParser,
    add_public,
    add_rank,
    add_run_or_model,
    add_weights,
    required_model,
)
from arvideo_ds.config import FinetuneRecipe
from arvideo_ds.errors import UserError, command
from arvideo_ds.runs import run_folder


@command
def main() -> None:
    parser = CommandParser(description=__doc__)
    add_run_or_model(parser, "folder of a fine-tuned run, or a public classifier")
    text = "default: evaluation.shards of the run's recipe; needed for a public classifier"
    parser.add_argument("--shards", help=text)
    text = "such as 5x3; default: evaluation.views of the recipe"
    parser.add_argument("--views", type=parse_views, metavar="TxS", help=text)
    text = "folder of a public classifier's result; default: runs/NAME"
    parser.add_argument("--output", type=Path, help=text)
    add_weights(parser, run_folder.WEIGHTS)
    add_public(parser)
    add_rank(parser)
    args = parser.parse_args()
    path = required_model(args)
    from arvideo_ds.evaluation.public import PublicOptions, is_public, read_public

    options = PublicOptions(args.labels, args.override)
    if not is_public(path):
        options.require_unused(path)
        _evaluate_run(path, args.weights, args.shards, args.views)
        return
    if args.views is not None:
        views = f"evaluation.views={list(args.views)}"
        options = PublicOptions(args.labels, [*args.override, views])
    public = read_public(path, options, weights=args.weights)
    where = args.shards or public.recipe.evaluation.shards
    if where is None:
        raise UserError(f"{path} does not say on which videos to test it; give --shards SHARDS.")
    output = args.output or Path("runs") / public.path.resolve().stem
    run_folder.require_own(output, run_folder.SUMMARY)
    from arvideo_ds.train.evaluate import evaluate_public

    evaluate_public(public, where, output)


def _evaluate_run(
    run: Path, name: str | None, where: str | None, views: tuple[int, int] | None
) -> None:
    recipe = run_folder.read_recipe(run, FinetuneRecipe)
    weights = run_folder.choose_weights(run, name)
    where = where or recipe.evaluation.shards
    if where is None:
        raise UserError("the recipe has no evaluation.shards; give --shards SHARDS.")
    from arvideo_ds.train.evaluate import evaluate

    views = views or recipe.evaluation.views
    evaluate(run, recipe, where, views=views, name=weights)


def parse_views(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"--views {text} must be TEMPORALxSPATIAL, such as 5x3.")
    return int(parts[0]), int(parts[1])
