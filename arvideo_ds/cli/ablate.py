"""Run a grid: recipes x seeds, probed or tested, and one table with the paper's figures.

    arvideo ablate motion --seeds 3 --output runs/motion --jobs 2
    arvideo ablate weizmann --output runs/ablate_weizmann --train SHARDS --test SHARDS
    arvideo ablate paper --output runs/ablate_ssv2 --train SHARDS --test SHARDS \\
        --slurm --sbatch '--nodes 1 --gpus-per-node 8 --ntasks-per-node 8 --time 24:00:00'
    arvideo ablate finetuning --base finetune_weizmann finetune.init_from=RUN --output OUT \\
        --train SHARDS --test SHARDS
    arvideo ablate finetuning finetune.init_from=runs/fold{fold} --output OUT \\
        --train S/train1 --test S/test1 --train S/train2 --test S/test2     # two folds

GRID is a name or a YAML file (docs/ablations.md). --train: shards to train on and to fit probes on
(data.shards=... gives other, also unlabelled, shards for pretraining); --test: to test on. Given
several times, they are folds: every recipe runs with every seed on each of them, and rows are
compared fold by fold. {fold} and {seed} in overrides are replaced by the numbers, from 0.
The same command resumes an interrupted grid: finished cells are kept, failed ones tried again.
Writes OUTPUT/table.md, table.json, table.png and table.html. With --slurm, the same command prints
the state and writes the tables while the array runs, and submits the unfinished cells afterwards.
Exit code 1: cells failed.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

from arvideo_ds.ablation import array, table
from arvideo_ds.ablation.cell import Cell, cells_of, in_fold, numbered, require_same, run_cell
from arvideo_ds.ablation.grid import GridPlan, grid_names, read_grid, resolve
from arvideo_ds.ablation.judges import Judge, judge_of
from arvideo_ds.ablation.pool import run_cells
from arvideo_ds.arguments import (
    CommandParser,
    add_deepspeed,
    add_overrides,
    from_arguments,
    require_at_least,
)
from arvideo_ds.config import Recipe, load_recipe
from arvideo_ds.errors import EXIT_INTERRUPTED, EXIT_OK, UserError, command
from arvideo_ds.files.atomic import write_json, write_text
from arvideo_ds.files.locks import lock
from arvideo_ds.shards import synthetic_sets
from arvideo_ds.tasks import task_of
from arvideo_ds.version import git_commit

EXIT_FAILED = 1


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    parser.add_argument("grid", metavar="GRID", help=f"{', '.join(grid_names())}; or a YAML file")
    parser.add_number("seeds", 3, "runs of every recipe")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--base", metavar="RECIPE", help="instead of the grid's base recipe")
    for option in ("--train", "--test"):
        parser.add_argument(
            option,
            action="append",
            default=[],
            metavar="SHARDS",
            help="labelled shards; default: the recipe's; again for each further fold",
        )
    parser.add_argument("--jobs", type=int, help="cells at a time; default 1, with --slurm all")
    # Cells are small: sharding gains nothing, and on a CPU ZeRO-2 is a third slower.
    add_deepspeed(parser, "zero0")
    parser.add_argument("--slurm", action="store_true", help="cells as a Slurm job array")
    parser.add_argument("--sbatch", default="", metavar="OPTIONS", help="options of sbatch")
    parser.add_argument("--cell", type=int, help=argparse.SUPPRESS)  # a task of the array
    add_overrides(parser)
    return parser.parse_intermixed_args()


@command
def main() -> int:
    args = parse_arguments()
    require_at_least(1, args, "seeds", "jobs")
    grid = read_grid(args.grid, args.base)
    judge = judge_of(load_recipe(grid.base, [], Recipe))
    folds = folds_of(args.train, args.test, judge)
    overrides = (*folds[0], *args.overrides)
    plan = resolve(grid, overrides)
    cells = from_arguments(cells_of, args, plan=plan, overrides=overrides, folds=folds)
    if args.cell is not None:
        return run_cell(cells[args.cell])
    for name in task_of(plan.base).sets_to_make():
        synthetic_sets.ensure(name)
    data, chance = data_of_folds(plan, folds, (*grid.overrides, *overrides))
    for cell in cells:
        require_same(cell, data[cell.fold])
    facts = {"seeds": args.seeds, "folds": len(folds), "overrides": list(overrides)}
    facts |= data[0] if len(folds) == 1 else {"data": data}
    facts["commit"] = git_commit()
    with lock(args.output):
        failed: dict[str, str] = {}
        try:
            code = submit(args, cells) if args.slurm else run_here(args, cells, failed)
        except KeyboardInterrupt:
            code = EXIT_INTERRUPTED
        write(args.output, table.summarize(plan, cells, failed, chance=chance, facts=facts))
    return code


def folds_of(train: list[str], test: list[str], judge: Judge) -> list[tuple[str, ...]]:
    """Overrides that name the shards of each fold; one fold without any where none are given.

    Errors: `UserError` where they are not given in pairs.
    """
    given = {"train": train, "test": test}
    count = max(1, *map(len, given.values()))
    if count > 1 and len(train) != len(test):
        raise UserError(
            f"--train is given {len(train)} times and --test {len(test)} times; give both for "
            "every fold."
        )
    return [
        tuple(
            f"{key}={given[option][fold]}"
            for option, keys in judge.shards.items()
            if given[option]
            for key in keys
        )
        for fold in range(count)
    ]


def data_of_folds(
    plan: GridPlan, folds: list[tuple[str, ...]], overrides: tuple[str, ...]
) -> tuple[list[dict[str, Any]], float]:
    """Identifies the data of each fold, and gives the accuracy of guessing in percent.

    Errors: `UserError` as `Probing.data`, or where folds have different numbers of classes.
    """
    found = []
    for fold, shards in enumerate(folds):
        words = numbered(in_fold(overrides, folds[0], shards), fold, 0)
        recipe = load_recipe(plan.grid.base, words, Recipe)
        found.append(judge_of(recipe).data(recipe, plan.grid.probe_videos))
    if len({chance for _, chance in found}) > 1:
        raise UserError("the folds have different numbers of classes; compare each of them alone.")
    return [data for data, _ in found], found[0][1]


def run_here(args: argparse.Namespace, cells: list[Cell], failed: dict[str, str]) -> int:
    unfinished, jobs = [cell for cell in cells if cell.result() is None], args.jobs or 1
    print(f"{len(cells)} cells, {len(unfinished)} to run, {jobs} at a time", flush=True)
    failed |= run_cells(unfinished, jobs, partial(print, flush=True))
    return EXIT_FAILED if failed else EXIT_OK


def submit(args: argparse.Namespace, cells: list[Cell]) -> int:
    """One task per unfinished cell, unless an earlier array is still in the queue."""
    unfinished = [number for number, cell in enumerate(cells) if cell.result() is None]
    running = array.waiting_job(args.output)
    if running is not None:
        remaining = f"{len(unfinished)} of {len(cells)} cells are left"
        print(f"array {running} still runs; {remaining}", flush=True)
    elif unfinished:
        words = array.sbatch_command(
            unfinished, sys.argv[1:], output=args.output, jobs=args.jobs, options=args.sbatch
        )
        print(f"array {array.submit(words, args.output)}: {len(unfinished)} cells", flush=True)
    return EXIT_OK


def write(output: Path, document: dict[str, Any]) -> None:
    from arvideo_ds.ablation import pictures

    print(table.state(document), flush=True)
    write_json(output / "table.json", document)
    write_text(output / "table.md", table.markdown(document))
    figure = pictures.draw_grid(document, document["ablations"], per_line=2)
    figure.savefig(output / "table.png", dpi=110)
    pictures.write_page(output / "table.html", document)
    for ablation in document["ablations"]:
        print(f"{ablation['name']}: {next(iter(ablation['verdicts'].values()))}", flush=True)
    print(f"table: {output / 'table.html'}", flush=True)
