"""Check whether this machine, or these machines, are fit to train on.

    arvideo doctor --output runs                             this machine
    srun --nodes 2 --ntasks-per-node 8 arvideo doctor        all ranks; or deepspeed, torchrun

Prints one line per check: ok, warning or problem, with what to do.
Exit code 1: a problem.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from pathlib import Path

from arvideo_ds.arguments import CommandParser, add_rank
from arvideo_ds.doctor.examine import examine, measure
from arvideo_ds.doctor.report import Finding, exit_code, render
from arvideo_ds.errors import UserError, command


@command
def main() -> int:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs"), help="folder of runs")
    parser.add_argument("--json", action="store_true", help="a list of findings for programs")
    add_rank(parser)
    args = parser.parse_args()
    findings = examine(args.output)
    try:
        from arvideo_ds.engine.world import start_world

        with contextlib.redirect_stdout(sys.stderr):
            world = start_world()
        findings = measure(world, findings)
        is_main = world.is_main
    except (ImportError, UserError) as error:
        findings.append(Finding("start", "problem", " ".join(str(error).split())))
        is_main = True
    if is_main:
        report = [dataclasses.asdict(finding) for finding in findings]
        print(json.dumps(report, indent=1) if args.json else render(findings), flush=True)
    return exit_code(findings)
