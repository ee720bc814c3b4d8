#!/usr/bin/env python3
"""Look whether this machine, or these machines, are fit to train on.

    python scripts/doctor.py --output runs                     this machine
    srun --nodes 2 --ntasks-per-node 8 python scripts/doctor.py    all ranks; also by deepspeed
                                                               and torchrun

A line each: ok, warning or problem, with what to do. Exit codes: 0 no problem; 1 a problem.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arvideo_ds.arguments import CommandParser
from arvideo_ds.doctor import machine, software
from arvideo_ds.doctor.report import Finding, exit_code, of_other_hosts, render
from arvideo_ds.errors import UserError, command

if TYPE_CHECKING:
    from arvideo_ds.engine.world import World


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs"), help="where runs would go")
    parser.add_argument("--json", action="store_true", help="a list of findings for programs")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher
    return parser.parse_args()


@command
def main() -> int:
    args = parse_arguments()
    findings = examine(args.output)
    try:
        from arvideo_ds.engine.world import start_world

        # Standard output is for the report.
        with contextlib.redirect_stdout(sys.stderr):
            world = start_world()
        findings = measure(world, findings)
        prints = world.is_main
    except (ImportError, UserError) as error:
        findings.append(Finding("start", "problem", " ".join(str(error).split())))
        prints = True
    if prints:
        report = [dataclasses.asdict(finding) for finding in findings]
        print(json.dumps(report, indent=1) if args.json else render(findings), flush=True)
    return exit_code(findings)


def examine(folder: Path) -> list[Finding]:
    """What one process can see by itself."""
    versions = software.installed()
    findings = [
        *software.check_packages(versions),
        *software.check_declared(versions),
        *software.check_pairs(versions),
        software.check_compilers(),
    ]
    try:
        from arvideo_ds.decoding.decoders import available_decoders

        findings += software.check_decoders(available_decoders())
    except ImportError as error:
        findings.append(Finding("decoders", "problem", str(error), "make setup"))
    return findings + machine.examine(folder)


def measure(world: World, findings: list[Finding]) -> list[Finding]:
    """Speed of every rank and of all together; other hosts add what is not ok. Collective."""
    import torch.distributed as dist

    from arvideo_ds.doctor import speed

    gpus = speed.check_gpus()
    here = (socket.gethostname(), world.local_rank, [*findings, gpus])
    everywhere: list[Any] = [None] * world.size
    dist.all_gather_object(everywhere, (*here, speed.matmul_gflops(world.device)))
    report = [*findings, gpus]
    # One process speaks for its host.
    for host, local_rank, found, _ in everywhere[1:]:
        report += of_other_hosts(host, found) if local_rank == 0 and host != here[0] else []
    report.append(speed.check_matmul([gflops for *_, gflops in everywhere], world.device))
    if world.size > 1:
        report.append(speed.check_all_reduce(world.device))
    dist.destroy_process_group()
    return report


if __name__ == "__main__":
    sys.exit(main())
