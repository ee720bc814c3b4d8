"""Which launcher, and how many ranks, from the environment alone."""

from __future__ import annotations

import pytest

from arvideo_ds.engine.launcher import find_launcher, planned_world_size

RANKED = {"RANK": "3", "WORLD_SIZE": "16", "LOCAL_RANK": "1"}
SLURM_JOB = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}


@pytest.mark.parametrize(
    ("environment", "launcher", "size"),
    [
        ({}, "python", 1),
        (RANKED, "deepspeed", 16),
        ({**RANKED, "TORCHELASTIC_RUN_ID": "x"}, "torchrun", 16),
        ({**SLURM_JOB, "SLURM_STEP_ID": "0"}, "srun", 8),
        # A batch script, or a shell of one task, is one process.
        (SLURM_JOB, "python", 1),
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "1"}, "python", 1),
        ({"SLURM_STEP_ID": "0"}, "python", 1),
        # A launcher started by srun on every node: its own numbers count.
        ({**SLURM_JOB, "SLURM_STEP_ID": "0", **RANKED}, "deepspeed", 16),
        # Half an answer is none.
        ({"WORLD_SIZE": "16"}, "python", 1),
    ],
)
def test_the_launcher_is_told_by_its_variables(
    environment: dict[str, str], launcher: str, size: int
) -> None:
    assert find_launcher(environment) == launcher
    assert planned_world_size(environment) == size


def test_this_process_is_asked_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in RANKED.items():
        monkeypatch.setenv(name, value)
    assert planned_world_size() == 16
