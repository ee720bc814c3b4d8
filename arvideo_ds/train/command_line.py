"""The arguments of all training commands, and the start of a run."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from arvideo_ds.arguments import (
    CommandParser,
    add_deepspeed,
    add_overrides,
    add_rank,
    from_arguments,
    require_at_least,
)
from arvideo_ds.config import RECIPES, Recipe, recipe_names
from arvideo_ds.engine.launcher import planned_world_size
from arvideo_ds.errors import EXIT_OK, UserError
from arvideo_ds.planning.plan import phase_lines, source_lines
from arvideo_ds.runs import run_folder
from arvideo_ds.shards import synthetic_sets
from arvideo_ds.train.settle import RunOptions, settle
from arvideo_ds.train.signals import end_on_signals, ignore_signals

# A list of numbers in indented JSON. Strings have no line breaks there.
_NUMBERS = re.compile(r"\[\n[\s\d.,e+-]+\]")


def training_parser(description: str, task: str, deepspeed_config: str | Path) -> CommandParser:
    """The parser of a training command. task: whose recipes the help lists."""
    parser = CommandParser(description=description)
    names = ", ".join(recipe_names(task))
    parser.add_argument("--recipe", metavar="NAME|PATH", help=f"one of: {names}; or a YAML file")
    add_deepspeed(parser, deepspeed_config)
    parser.add_argument("--output", type=Path, help="folder of the run; default runs/<recipe>")
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="start nothing; print recipe, plan and DeepSpeed dict as JSON, and the plan in words",
    )
    parser.add_argument("--world_size", type=int, help="with --dry_run: ranks to plan for")
    add_rank(parser)
    add_overrides(parser)
    return parser


def train_on_encoder(description: str, task: str) -> int:
    """The command of a task that trains a pretrained encoder; --recipe is required."""
    parser = training_parser(description, task, "zero1")
    add_init_from(parser)
    args = parser.parse_intermixed_args()
    if args.recipe is None:
        raise UserError(f"--recipe is missing: one of {', '.join(recipe_names(task))}, or a file.")
    return train(args, RECIPES[task], overrides=[*args.overrides, *init_from(args, task)])


def add_init_from(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--init-from", metavar="PATH", help="weights to begin with; none = scratch")


def init_from(args: argparse.Namespace, task: str) -> list[str]:
    """--init-from as an override of the task's recipe."""
    return [] if args.init_from is None else [f"{task}.init_from={args.init_from}"]


def train(args: argparse.Namespace, kind: type[Recipe], **more: Any) -> int:
    """Print the settings of the run (--dry_run), or start it; the exit code. Errors: `UserError`.

    args: of a `training_parser`. more: fields of `RunOptions` that override args.
    """
    options = from_arguments(RunOptions, args, **more)
    if args.dry_run:
        return _describe(args, options, kind)
    end_on_signals()
    settings = settle(options, kind, world_size=planned_world_size())
    run_folder.require_same_mathematics(options.folder, settings.recipe)
    if options.resume is None and not run_folder.has_checkpoints(options.folder):
        settings.task.check_start()
    # After all other checks: it takes minutes.
    if sets := settings.task.sets_to_make():
        for name in sets:
            synthetic_sets.ensure(name)
        settings = settle(options, kind, world_size=planned_world_size())
    settings.require_shards()
    # After all checks: torch and DeepSpeed take seconds to load.
    from arvideo_ds.train.run import start

    code = start(settings)
    # The first rank that ends with a code other than 0 makes srun end the others with SIGTERM;
    # their code would then be that, and the job would not be requeued.
    ignore_signals()
    return code


def _describe(args: argparse.Namespace, options: RunOptions, kind: type[Recipe]) -> int:
    require_at_least(1, args, "world_size")
    settings = settle(options, kind, world_size=args.world_size or planned_world_size())
    print(_NUMBERS.sub(_on_one_line, json.dumps(settings.as_dict(), indent=1)), flush=True)
    plan, notes = settings.plan, [f"note: {note}" for note in settings.notes()]
    for line in [settings.in_words(), *source_lines(plan), *phase_lines(plan), *notes]:
        print(line, file=sys.stderr, flush=True)
    return EXIT_OK


def _on_one_line(numbers: re.Match[str]) -> str:
    return re.sub(r"\s+", " ", numbers[0]).replace("[ ", "[").replace(" ]", "]")
