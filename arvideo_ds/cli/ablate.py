"""Run a grid: recipes x seeds, probed or tested, and one table with the paper's figures.

    arvideo ablate motion --seeds 3 --output runs/motion --jobs 2
    arvideo ablate weizmann --output runs/ablate_weizmann --train SHARDS --test SHARDS
    arvideo ablate paper --output runs/ablate_ssv2 --train SHARDS --test SHARDS \\
        --slurm --sbatch '--nodes 1 --gpus-per-node 8 --ntasks-per-node 8 --time 24:00:00'
    arvideo ablate finetuning --base finetune_weizmann finetune.init_from=RUN --output OUT \\
        --train SHARDS --test SHARDS

GRID is a name or a YAML file (docs/ablations.md). --train: shards to train on and to fit probes on
(data.shards=... gives other, also unlabelled, shards for pretraining); --test: to test on.
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
from arvideo_ds.ablation.cell import Cell, cells_of, require_same, run_cell
from arvideo_ds.ablation.grid import grid_names, read_grid, resolve
from arvideo_ds.ablation.judges import judge_of
from arvideo_ds.ablation.pool import run_cells
from arvideo_ds.arguments import (
    CommandParser,
    add_deepspeed,
    add_overrides,
    from_arguments,
    require_at_least,
)
from arvideo_ds.config import Recipe, load_recipe
from arvideo_ds.errors import EXIT_INTERRUPTED, EXIT_OK, command
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
    parser.add_argument("--train", help="labelled shards; default: the recipe's")
    parser.add_argument("--test", help="labelled shards; default: the recipe's")
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
    shards = [(keys, getattr(args, option)) for option, keys in judge.shards.items()]
    settings = [f"{key}={where}" for keys, where in shards if where for key in keys]
    overrides = (*settings, *args.overrides)
    plan = resolve(grid, overrides)
    cells = from_arguments(cells_of, args, plan=plan, overrides=overrides)
    if args.cell is not None:
        return run_cell(cells[args.cell])
    for name in task_of(plan.base).sets_to_make():
        synthetic_sets.ensure(name)
    data, chance = judge.data(plan.base, grid.probe_videos)
    for cell in cells:
        require_same(cell, data)
    facts = {"seeds": args.seeds, "overrides": list(overrides), **data, "commit": git_commit()}
    with lock(args.output):
        failed: dict[str, str] = {}
        try:
            code = submit(args, cells) if args.slurm else run_here(args, cells, failed)
        except KeyboardInterrupt:
            code = EXIT_INTERRUPTED
        write(args.output, table.summarize(plan, cells, failed, chance=chance, facts=facts))
    return code


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
