"""Test a fine-tuned run: every video once, several views of each, on any number of ranks.

    arvideo evaluate runs/finetune_vit_b_k400
    torchrun --nproc_per_node 8 -m arvideo_ds evaluate RUN --shards /data/k400-val --views 5x3
    arvideo evaluate RUN --weights ema

Views are temporal x spatial, averaged after the softmax. Writes to RUN/evaluation/: the result as
JSON, every video's probabilities as safetensors, and the confusion matrix as a picture. Unreadable
videos are listed and counted.
"""

from __future__ import annotations

from pathlib import Path

from arvideo_ds.arguments import CommandParser, add_rank, add_weights
from arvideo_ds.config import FinetuneRecipe
from arvideo_ds.errors import UserError, command
from arvideo_ds.runs import run_folder


@command
def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a fine-tuned run")
    parser.add_argument("--shards", help="default: evaluation.shards of the run's recipe")
    text = "such as 5x3; default: evaluation.views of the recipe"
    parser.add_argument("--views", type=parse_views, metavar="TxS", help=text)
    add_weights(parser, run_folder.WEIGHTS)
    add_rank(parser)
    args = parser.parse_args()
    recipe = run_folder.read_recipe(args.run, FinetuneRecipe)
    weights = run_folder.choose_weights(args.run, args.weights)
    where = args.shards or recipe.evaluation.shards
    if where is None:
        raise UserError("the recipe has no evaluation.shards; give --shards SHARDS.")
    from arvideo_ds.train.evaluate import evaluate

    views = args.views or recipe.evaluation.views
    evaluate(args.run, recipe, where, views=views, name=weights)


def parse_views(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"--views {text} must be TEMPORALxSPATIAL, such as 5x3.")
    return int(parts[0]), int(parts[1])
