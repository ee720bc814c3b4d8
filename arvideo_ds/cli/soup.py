"""Average the weights of several fine-tuned runs with the same initial weights (a model soup).

    arvideo soup runs/a runs/b runs/c --output runs/soup
    arvideo soup runs/a runs/b runs/c --output runs/soup --greedy --shards VALIDATION

--greedy: starts from the best run and adds each further run that does not lower the accuracy of
the mean on --shards (central clips). The output is a run folder for `arvideo evaluate`, `predict`
and `export`.
"""

from __future__ import annotations

import json
from pathlib import Path

from arvideo_ds.arguments import CommandParser
from arvideo_ds.config import FinetuneRecipe
from arvideo_ds.errors import UserError, command
from arvideo_ds.runs import run_folder


@command
def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of fine-tuned runs")
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    parser.add_argument(
        "--greedy", action="store_true", help="only runs that do not lower the accuracy"
    )
    parser.add_argument("--shards", help="labelled shards for --greedy")
    args = parser.parse_args()
    if len(args.runs) < 2:
        raise UserError(f"expected two or more runs to average, but got {len(args.runs)}.")
    if args.output.exists():
        raise UserError(f"--output {args.output} exists already; give a new folder.")
    if args.greedy != (args.shards is not None):
        raise UserError("--greedy and --shards go together.")
    recipes = [run_folder.read_recipe(run, FinetuneRecipe) for run in args.runs]
    from arvideo_ds.evaluation.soup import write_soup

    print(json.dumps(write_soup(args.runs, recipes, args.output, args.shards), indent=1))
