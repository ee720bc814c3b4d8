"""What must not harm a run, done to real runs: numbers that are none, ranks that hang or die."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from arvideo_ds.runs import run_folder
from arvideo_ds.train.failure import EXIT_CRASH
from arvideo_ds.train.guard import REFUSED
from tests import warm_start
from tests.conftest import free_port
from tests.train.conftest import FAULTY, Runs, processes_of, stop

pytestmark = pytest.mark.dist


def not_applied(folder: Path) -> list[dict[str, Any]]:
    return run_folder.read_of_ranks(folder, REFUSED)


def keys_of(shards: Path) -> set[str]:
    return {
        sample["key"]
        for path in shards.glob("*.index.json")
        for sample in json.loads(path.read_text())["samples"]
    }


@pytest.mark.parametrize("kind", ["nan_loss", "infinite_gradient"])
def test_a_step_that_is_not_finite_is_not_applied_counted_and_dumped(runs: Runs, kind: str) -> None:
    options = ("train.max_steps=8", "train.log_every=4", "train.micro_batch=2")
    output = runs.run(kind, *options, ranks=2, fault=f"{kind}:3:3:1")
    metrics = runs.metrics(kind)
    assert [line["guard/refused_total"] for line in metrics] == [0, 1, 1]
    assert all(line["loss/pretrain"] < 10 for line in metrics)
    assert "steps not applied 1" in output
    first, second = not_applied(runs.folder / kind)
    assert (first["rank"], second["rank"], first["step"], second["step"]) == (0, 1, 3, 3)
    assert None not in first["losses"]
    assert (None in second["losses"]) == (kind == "nan_loss")
    # 8 clips = 4 videos x 2; two ranks, two micro-batches each.
    videos = [video for line in (first, second) for batch in line["videos"] for video in batch]
    assert len(videos) == 4
    assert len({*videos} & keys_of(runs.shards)) == len({*videos})


def test_too_many_in_a_row_stop_the_run_on_every_rank(runs: Runs) -> None:
    output = runs.run(
        "stopped",
        "train.max_steps=30",
        "train.save_every=2",
        "train.max_refused_steps=4",
        ranks=2,
        fault="nan_loss:5:99:0",
        code=2,
    )
    assert "steps 5 to 8 were not applied" in output
    assert output.count("error:") == 1, "every rank says the same"
    assert "Traceback" not in output
    # Once the cause is gone the same command goes on.
    output = runs.run("stopped", "train.max_steps=30", "train.save_every=2")
    assert "going on after step 6" in output
    assert runs.metrics("stopped")[-1]["guard/refused_total"] == 2


def test_the_rank_that_fails_is_heard_first_and_the_others_follow_at_once(runs: Runs) -> None:
    options = ("train.max_steps=3000",)
    output = runs.run("crash", *options, launcher=runs.deepspeed(2), fault="crash:3:3:1", code=None)
    failed_at = (runs.folder / "crash" / "failures" / "rank-00001.txt").stat().st_mtime
    assert time.time() - failed_at < 30
    assert output.count("Traceback") == 1, output[-3000:]
    assert "RuntimeError: the fault of this test" in output
    assert "rank 1 on" in output.split("Traceback")[0]
    told = re.search(r"rank 0 on \S+ stops.*", output)
    assert told is None or "since rank 1 failed" in told.group()


def test_a_rank_that_is_killed_is_missed_by_the_others(runs: Runs) -> None:
    options = ("train.max_steps=3000",)
    output = runs.run("killed", *options, ranks=2, fault="kill:3:3:1", code=None)
    assert "Traceback" not in output.replace("Traceback (most recent call last):\n  File", "", 0)
    told = re.search(r"rank 0 on \S+ stops.*", output)
    assert told is None or re.search("another rank is gone|rank 1 failed: ended", told.group())


@pytest.mark.parametrize(
    ("fault", "failure"), [("crash", "RuntimeError: the fault"), ("kill", "ended without a report")]
)
def test_a_rank_ends_within_seconds_though_its_collective_hangs(
    runs: Runs, fault: str, failure: str
) -> None:
    """As with NCCL: the wait of rank 0 never returns, and only its own thread can end it."""
    environment = {
        **runs.environment,
        **{"ARVIDEO_FAULT": f"{fault}:3:3:1", "ARVIDEO_OTHERS_HANG": "1", "WORLD_SIZE": "2"},
        **{"LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())},
    }
    name, options = f"{fault}_hang", ("train.max_steps=6", "train.save_every=2")
    command = runs.command(name, *options, script=FAULTY)
    survivor, failing = (
        warm_start.start(
            command, cwd=runs.folder, env={**environment, "RANK": rank, "LOCAL_RANK": rank}
        )
        for rank in "01"
    )
    try:
        failing.wait(timeout=120)
        started = time.monotonic()
        output, _ = survivor.communicate(timeout=30)
    finally:
        stop(survivor)
        stop(failing)
    assert time.monotonic() - started < 15
    assert survivor.returncode == EXIT_CRASH
    assert re.search(rf"rank 0 on \S+ stops, since rank 1 failed: {failure}", output), output
    # The failures of that start end no later one.
    output = runs.run(name, *options, ranks=2)
    assert "going on after step 2" in output


def lines_until(process: Any, text: str) -> Iterator[str]:
    for line in process.stdout:
        yield line
        if text in line:
            return


def test_a_rank_that_hangs_is_named_and_every_stack_written(runs: Runs) -> None:
    process = runs.start(
        "hang",
        "train.max_steps=30",
        "train.stall_s=8",
        ranks=2,
        fault="hang:3:3:1",
    )
    try:
        output = "".join(lines_until(process, "stacks of every rank"))
    finally:
        # The one that hangs hears no other signal.
        for rank in processes_of(runs.folder / "hang"):
            os.kill(rank, signal.SIGKILL)
        stop(process)
    late = re.search(r"late: rank (\d).*in (\w+) of step (\d+)", output)
    assert late is not None, output[-3000:]
    assert late.groups() == ("1", "forward", "3")
    assert re.search(r"waits: rank 0 .* of step 3", output)
    stacks = sorted((runs.folder / "hang" / "heartbeats").glob("*.stack"))
    assert len(stacks) == 2
    assert "in hang" in stacks[1].read_text()
    assert "in train" in stacks[0].read_text()
