"""Draw a finished run: loss, probes and predicted clips, in one report.html.

arvideo report runs/demo
arvideo report runs/my_run --shards SHARDS --clips 4 --pictures FOLDER   # as PNG files too
"""

from __future__ import annotations

from pathlib import Path

from arvideo_ds.arguments import CommandParser, require_at_least
from arvideo_ds.config import PretrainRecipe
from arvideo_ds.errors import command
from arvideo_ds.runs import run_folder


@command
def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--shards", help="clips to show; default: probe.test_shards, data.shards")
    parser.add_number("clips", 3, "clips to show")
    parser.add_number("steps", 8, "steps of a prediction to show, from the first to the last")
    parser.add_argument(
        "--pictures", type=Path, metavar="FOLDER", help="write the pictures there as PNG files too"
    )
    args = parser.parse_args()
    require_at_least(0, args, "clips")
    require_at_least(1, args, "steps")
    recipe = run_folder.read_recipe(args.run, PretrainRecipe)
    from arvideo_ds.train.report import write_report

    path = write_report(
        args.run, recipe, args.shards, args.clips, steps=args.steps, pictures_to=args.pictures
    )
    print(f"report: {path}")
