"""scripts/slurm/pretrain.sbatch on a real cluster: finish, requeue, lose a node, crash."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slurm
Start = Callable[..., Any]  # -> Job, of conftest.py
SBATCH = Path(__file__).parent.parent.parent / "scripts" / "slurm" / "pretrain.sbatch"

# Runs the command line that follows it, with the engine's step changed on the way.
WRAPPER = """
import os, runpy, sys, time
from arvideo_ds.engine.build import Engine

real_step, steps = Engine.step, []

def step(engine):
    steps.append(1)
    {change}
    real_step(engine)

Engine.step = step
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
CRASH = """if os.environ["RANK"] == "1" and len(steps) == 3:
        raise ValueError("broken on purpose")"""
WAITS_FOR_USR1 = """
import signal, sys

signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
print(sys.argv[1], flush=True)
signal.sigwait([signal.SIGUSR1])
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.exit(75)
"""
# As slow on any machine: Slurm's clock must not come too late.
SLOW_SECOND_START = 'time.sleep(1.0 * (os.environ.get("SLURM_RESTART_COUNT") == "1"))'


def python_with(change: str, folder: Path) -> str:
    """sbatch's option that runs the ranks with the change."""
    wrapper = folder / "wrapper.py"
    wrapper.write_text(WRAPPER.format(change=change))
    return f"--export=ALL,PYTHON={sys.executable} {wrapper}"


def require_one_curve(job: Any, steps: int) -> None:
    """Every step once and in order, whatever came between."""
    assert job.state == "COMPLETED", job.log
    assert [line["step"] for line in job.metrics()] == list(range(1, steps + 1))
    assert (job.run / "model.safetensors").is_file()


def test_a_job_on_two_nodes_finishes(start_job: Start) -> None:
    job = start_job("train.max_steps=10")
    seconds = job.wait_for_end()
    require_one_curve(job, 10)
    # Each rank says where it is; all of them meet in one place.
    places = re.findall(r"^\d+: rank (\d) of 2: .* on (node\d), .* at (\S+)$", job.log, re.M)
    meeting = places[0][2]
    assert sorted(places) == [("0", "node1", meeting), ("1", "node2", meeting)]
    assert "2 rank(s) by srun on cpu, ZeRO stage 2" in job.log
    print(f"finished after {seconds:.1f} s")


def test_srun_alone_starts_ranks_on_unequal_nodes(cluster: Any, recipe: Path) -> None:
    pretrain = [sys.executable, "scripts/pretrain.py", f"--recipe={recipe}", "train.max_steps=3"]
    output = f"--output={recipe.parent / 'run'}"
    log = cluster.call("srun", "--nodes=2", "--ntasks=3", *pretrain, output)
    for rank, place in enumerate(("0 of 2 on node1", "1 of 2 on node1", "0 of 1 on node2")):
        assert f"rank {rank} of 3: process {place}" in log
    assert "finished 3 of 3 steps" in log


def test_a_signalled_job_saves_and_goes_on_after_each_requeue(
    start_job: Start, tmp_path: Path
) -> None:
    pytest.importorskip("wandb")
    # Slurm looks at time limits every 30 s, and signals early rather than late.
    limits = ("--time=2", "--signal=B:USR1@60", python_with(SLOW_SECOND_START, tmp_path))
    job = start_job("train.max_steps=80", "wandb.mode=offline", sbatch=limits)
    job.wait_for_step(5)
    # To the ranks themselves, past the batch script.
    job.cluster.call("scancel", "--signal=USR1", job.id)
    seconds = job.wait(lambda: job.restarts == 1, 90, "requeue")
    first = job.metrics()[-1]["step"]
    print(f"signal by hand: saved after step {first} and requeued in {seconds:.1f} s")
    assert "USR1 came" not in job.log
    seconds = job.wait_for_step(first + 1)
    print(f"trained again {seconds:.1f} s later")
    seconds = job.wait(lambda: job.restarts == 2, 150, "requeue")
    # A slow machine would not finish before the next signal.
    job.cluster.call("scontrol", "update", f"JobId={job.id}", "TimeLimit=30")
    second = job.metrics()[-1]["step"]
    print(f"time limit: saved after step {second} and requeued, {seconds:.1f} s later")
    assert "USR1 came" in job.log
    job.wait_for_end()
    require_one_curve(job, 80)
    assert re.findall(r"interrupted after (\d+) of 80", job.log) == [str(first), str(second)]
    assert re.findall(r"going on after step (\d+)", job.log) == [str(first), str(second)]
    ids = [path.name.rpartition("-")[2] for path in (job.run / "wandb").glob("offline-run-*")]
    assert ids == [(job.run / "wandb_id").read_text()] * 3


def test_a_cancelled_job_saves_and_stays_cancelled(start_job: Start) -> None:
    job = start_job("train.max_steps=2000")
    job.wait_for_step(5)
    job.cluster.call("scancel", job.id)
    job.wait_for_end()
    assert job.state == "CANCELLED"
    assert job.restarts == 0
    assert f"interrupted after {job.metrics()[-1]['step']} of 2000 steps" in job.log


def test_a_task_of_an_array_is_requeued_alone(cluster: Any, tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "pretrain.py").write_text(WAITS_FOR_USR1)
    place = ("--nodes=1", "--ntasks-per-node=1", f"--chdir={tmp_path}", "--output=%a.log")
    submit = ("sbatch", "--parsable", "--array=0-1", *place, SBATCH, "seed=%a")
    array = cluster.call(*submit).strip()
    try:
        for task in ("0", "1"):
            log = tmp_path / f"{task}.log"
            said = f"0: seed={task}\n"
            cluster.wait(lambda f=log, s=said: f.is_file() and s in f.read_text(), 20, said, log)
        # The last task has the id of the whole array.
        last = f"{array}_1"
        assert cluster.fact(last, "JobId") == array
        cluster.call("scancel", "--signal=USR1", last)
        cluster.wait(lambda: cluster.fact(last, "Restarts") == "1", 20, "requeue", log)
        assert cluster.fact(f"{array}_0", "Restarts") == "0"
        assert cluster.fact(f"{array}_0", "JobState") == "RUNNING"
    finally:
        cluster.call("scancel", array)


def test_a_job_that_lost_a_node_goes_on_when_the_node_is_back(start_job: Start) -> None:
    job = start_job("train.max_steps=60", "train.save_every=5")
    job.wait_for_step(12)
    job.cluster.stop("node2")
    seconds = job.wait(lambda: job.restarts == 1, 60, "requeue")
    print(f"requeued {seconds:.1f} s after the node's power failed")
    job.cluster.start()
    seconds = job.wait_for_end()
    print(f"finished {seconds:.1f} s after the node was back")
    require_one_curve(job, 60)
    # A node of a busy machine may answer Slurm too late, so that the job is requeued once more.
    going_on = re.findall(r"going on after step (\d+)", job.log)
    assert int(going_on[0]) >= 10
    assert int(going_on[0]) % 5 == 0


def test_a_crash_of_one_rank_fails_the_job_and_is_the_first_error(
    start_job: Start, tmp_path: Path
) -> None:
    job = start_job("train.max_steps=1000", sbatch=(python_with(CRASH, tmp_path),))
    job.wait_for_step(2)
    seconds = job.wait_for_end()
    print(f"failed {seconds:.1f} s after step 2")
    assert job.state == "FAILED"
    # torch puts the rank before every line of a traceback, srun another one before all lines.
    errors = re.findall(r"^(\d): (?:\[rank\d\]: )?(?:Traceback|error:|\w*Error:)", job.log, re.M)
    assert errors, job.log
    assert errors[0] == "1", job.log
    assert "ValueError: broken on purpose" in job.log
