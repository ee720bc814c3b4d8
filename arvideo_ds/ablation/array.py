"""Cells as the tasks of one Slurm job array, by scripts/slurm/pretrain.sbatch.

A task saves and requeues itself as a pretraining job does; it starts the ablation's own command
with `--cell N`, which runs that cell alone under the task's ranks.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from arvideo_ds.errors import UserError
from arvideo_ds.files.atomic import write_json

SBATCH = Path("scripts/slurm/pretrain.sbatch")
_SUBMITTED = "slurm.json"


def sbatch_command(
    cells: Sequence[int], arguments: Sequence[str], *, output: Path, jobs: int | None, options: str
) -> list[str]:
    """The command that submits the numbered cells, `jobs` of them at a time (None: all).

    arguments: of `arvideo ablate`. options: further arguments of sbatch, as one string.
    """
    numbers = ",".join(map(str, cells)) + (f"%{jobs}" if jobs else "")
    return [
        "sbatch",
        "--parsable",
        "--job-name=ablate",
        f"--array={numbers}",
        f"--output={output}/slurm-%A_%a.log",
        *shlex.split(options),
        str(SBATCH),
        "--cell=%a",
        *arguments,
    ]


def submit(command: Sequence[str], output: Path) -> str:
    """Submit the array and store its id. Errors: `UserError` with sbatch's message."""
    if not SBATCH.is_file():
        raise UserError(f"there is no {SBATCH} here; start --slurm from the root of the checkout.")
    job = _run(*command, PROGRAM="scripts/ablate.py").strip().partition(";")[0]
    write_json(output / _SUBMITTED, {"job": job})
    return job


def waiting_job(output: Path) -> str | None:
    """The last submitted array, if Slurm still has tasks of it."""
    path = output / _SUBMITTED
    if not path.is_file():
        return None
    job = str(json.loads(path.read_text())["job"])
    try:
        listed = _run("squeue", "--noheader", f"--jobs={job}", "--format=%i")
    except UserError:  # Slurm forgets the id some minutes after the last task
        return None
    return job if listed.strip() else None


def _run(*command: str, **variables: str) -> str:
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
    except FileNotFoundError:
        raise UserError(
            f"there is no {command[0]} on this machine; --slurm needs a login node of a Slurm "
            "cluster. Without --slurm the cells run here."
        ) from None
    if done.returncode:
        raise UserError(f"{command[0]} refused: {' '.join(done.stderr.split())}")
    return done.stdout
