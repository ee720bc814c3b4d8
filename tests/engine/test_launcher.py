"""Which launcher, how many ranks, and who among them, from the environment alone."""

from __future__ import annotations

import pytest

from arvideo_ds.engine.launcher import (
    find_launcher,
    first_host,
    planned_world_size,
    slurm_ranks,
    tasks_per_node,
)

RANKED = {"RANK": "3", "WORLD_SIZE": "16", "LOCAL_RANK": "1"}
SLURM_JOB = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}
# The fifth of seven tasks on four nodes, as srun tells it.
SLURM_TASK = {
    **SLURM_JOB,
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_NODELIST": "node[09-11],gpu5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
}


@pytest.mark.parametrize(
    ("environment", "launcher", "size"),
    [
        ({}, "python", 1),
        (RANKED, "deepspeed", 16),
        ({**RANKED, "TORCHELASTIC_RUN_ID": "x"}, "torchrun", 16),
        # A step smaller than its job.
        (SLURM_TASK, "srun", 7),
        # A batch script, a shell of one task and an interactive step are one process.
        (SLURM_JOB, "python", 1),
        ({**SLURM_JOB, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}, "python", 1),
        ({"SLURM_STEP_ID": "0"}, "python", 1),
        # A launcher started by srun on every node: its own numbers count.
        ({**SLURM_TASK, **RANKED}, "deepspeed", 16),
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


def test_a_task_of_srun_knows_its_rank_and_where_the_ranks_meet() -> None:
    ranks = slurm_ranks(SLURM_TASK)
    assert ranks.pop("MASTER_PORT").isdigit()
    assert ranks == {
        "RANK": "4",
        "WORLD_SIZE": "7",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "node09",
    }
    last = slurm_ranks({**SLURM_TASK, "SLURM_PROCID": "6", "SLURM_NODEID": "3"})
    assert (last["RANK"], last["LOCAL_WORLD_SIZE"]) == ("6", "1")


def test_what_was_exported_decides_where_the_ranks_meet_but_not_who_they_are() -> None:
    exported = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "5", "LOCAL_RANK": "1", "RANK": "9"}
    ranks = slurm_ranks({**SLURM_TASK, **exported})
    assert (ranks["MASTER_ADDR"], ranks["MASTER_PORT"]) == ("10.0.0.1", "5")
    assert (ranks["LOCAL_RANK"], ranks["RANK"]) == ("0", "4")


def test_neighbouring_jobs_and_restarts_and_steps_of_a_job_have_ports_of_their_own() -> None:
    def port(job: int, restart: int = 0, step: int = 0) -> int:
        numbers = {"JOB_ID": job, "RESTART_COUNT": restart, "STEP_ID": step}
        task = {**SLURM_TASK, **{f"SLURM_{name}": str(n) for name, n in numbers.items()}}
        return int(slurm_ranks(task)["MASTER_PORT"])

    assert len({port(job, restart) for job in range(1000, 1500) for restart in range(10)}) == 5000
    assert port(7) != port(7, step=1)
    assert all(1024 < port(job) < 32768 for job in range(0, 10**6, 997))


@pytest.mark.parametrize(
    ("listed", "counts"), [("2(x3),1", [2, 2, 2, 1]), ("8", [8]), ("1,2(x2),10", [1, 2, 2, 10])]
)
def test_tasks_per_node_are_read_as_slurm_writes_them(listed: str, counts: list[int]) -> None:
    assert tasks_per_node(listed) == counts


@pytest.mark.parametrize(
    ("listed", "first"),
    [
        ("node1", "node1"),
        ("node1,node7", "node1"),
        ("node[003-007,12],a", "node003"),
        ("n[5,7-9]", "n5"),
        ("rack[2-3]node[01-04]-ib,gpu[1-2]", "rack2node01-ib"),
        ("a-b.example,c[1-2]", "a-b.example"),
    ],
)
def test_the_first_host_is_read_as_slurm_writes_it(listed: str, first: str) -> None:
    assert first_host(listed) == first
