"""A run goes on anywhere: other ranks, other stages, after any kill at any moment."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

import pytest

from arvideo_ds.engine.checkpoints import newest_checkpoint
from tests.conftest import run_command
from tests.train.conftest import Runs, processes_of, stop

pytestmark = pytest.mark.dist
# make test does a few; the figure of twenty is ARVIDEO_KILLS=20.
KILLS = int(os.environ.get("ARVIDEO_KILLS", "3"))


def trained(folder: Path) -> dict[int, list[int]]:
    """Clips of each step over all ranks; a step that was done again counts once."""
    steps: dict[int, dict[int, list[int]]] = defaultdict(dict)
    for path in folder.glob("trained-*.jsonl"):
        rank = int(path.stem.partition("-")[2])
        for line in map(json.loads, path.read_text().splitlines()):
            steps[line["step"]].setdefault(rank, []).extend(line["clips"])
    return {step: sorted(itertools.chain(*ranks.values())) for step, ranks in steps.items()}


def working_folder(runs: Runs, name: str) -> Path:
    folder = runs.folder / f"{name}-cwd"
    folder.mkdir()
    shutil.copytree(runs.folder / "data", folder / "data")
    return folder


def test_other_ranks_and_stages_go_on_with_the_same_clips_to_the_same_curve(runs: Runs) -> None:
    whole, cut = working_folder(runs, "whole"), working_folder(runs, "cut")
    length = "train.max_steps=16"
    none = "none:0:0:0"
    runs.run("whole", length, ranks=2, fault=none, cwd=whole)
    plan = [(2, "zero2", 4), (1, "zero3", 8), (4, "zero1", 12), (2, "zero0", None)]
    for ranks, stage, stop_at in plan:
        fault = none if stop_at is None else f"interrupt:{stop_at - 1}:{stop_at - 1}:0"
        code = 0 if stop_at is None else None
        runs.run("cut", length, ranks=ranks, stage=stage, fault=fault, cwd=cut, code=code)
    assert trained(cut) == trained(whole)
    assert len(trained(cut)) == 16
    pairs = zip(runs.losses("cut"), runs.losses("whole"), strict=True)
    assert max(abs(a - b) / b for a, b in pairs) <= 1e-4
    stages = {line["step"]: line for line in runs.metrics("cut")}
    assert len(stages) == 16


class Watcher(threading.Thread):
    """Asks all the time whether there is a complete checkpoint; counts when there is none."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.ended = folder, threading.Event()
        self.seen = self.missing = 0

    def run(self) -> None:
        while not self.ended.wait(0.01):
            found = newest_checkpoint(self.folder) is not None
            self.missing += self.seen > 0 and not found
            self.seen += found


def kill_somewhere(runs: Runs, name: str, how: str, after: float, *options: str) -> None:
    """Start a run and kill it: `one` rank, `all` and what started them, or while `saving`."""
    fault = {"saving": f"kill_while_saving:{10 * int(after)}:0:0"}.get(how, "none:0:0:0")
    process = runs.start(name, *options, ranks=2, fault=fault)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step "):
                break
        threading.Thread(target=process.stdout.read, daemon=True).start()
        if how == "saving":
            process.wait(timeout=120)
            return
        time.sleep(after)
        if how == "one" and process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(random.choice(processes_of(runs.folder / name)), signal.SIGKILL)
            process.wait(timeout=120)
    finally:
        stop(process)


LONG = ("train.max_steps=60", "train.save_every=5")


@pytest.fixture(scope="module")
def unkilled(runs: Runs) -> Path:
    """The folder of a run of LONG on two ranks that was left alone."""
    runs.run("unkilled", *LONG, ranks=2)
    return runs.folder / "unkilled"


def same_weights(one: Path, other: Path) -> bool:
    return (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_flipped_bit_in_a_checkpoint_costs_its_steps_and_nothing_else(
    runs: Runs, unkilled: Path
) -> None:
    fault, folder = "interrupt:11:11:0", runs.folder / "flipped"
    runs.run("flipped", *LONG, ranks=2, fault=fault, code=75)
    newest = newest_checkpoint(folder / "checkpoints")
    assert newest is not None
    path = newest.path / "rank-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x40  # of a float's exponent, or near it
    path.write_bytes(content)
    output = runs.run("flipped", *LONG, ranks=2)
    assert f"{newest.path.name} is damaged (rank-00001.safetensors" in output
    assert "going on after step 10" in output
    assert same_weights(folder, unkilled)
    assert runs.losses("flipped") == runs.losses("unkilled")


@pytest.mark.slow
def test_whatever_is_killed_when_the_run_ends_as_if_nothing_had_been(
    runs: Runs, unkilled: Path
) -> None:
    options = LONG
    chance = random.Random(7)
    watcher = Watcher(runs.folder / "killed" / "checkpoints")
    watcher.start()
    for number in range(KILLS):
        how = ("one", "all", "saving")[number % 3]
        finished = newest_checkpoint(watcher.folder)
        step = 0 if finished is None else finished.step
        after = min(5, step // 10 + 1) if how == "saving" else chance.uniform(0, 1.5)
        if step < 50:
            kill_somewhere(runs, "killed", how, after, *options)
    runs.run("killed", *options, ranks=2)
    watcher.ended.set()
    assert watcher.seen > 0
    assert watcher.missing == 0, "at some moment there was no complete checkpoint"
    assert runs.losses("killed") == runs.losses("unkilled")
    assert same_weights(runs.folder / "killed", unkilled)


@pytest.mark.slow
def test_a_disk_that_fills_up_costs_no_checkpoint(runs: Runs, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = run_command("mount", "-t", "tmpfs", "-o", "size=10m", "tmpfs", small)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.strip()}")
    try:
        options = ("train.max_steps=20", "train.save_every=4", f"--output={small / 'run'}")
        output = runs.run("full", *options, "train.keep_checkpoints=9", ranks=2, code=2)
        assert "could not be written" in output
        assert "is intact" in output
        assert output.count("error:") == 1
        assert "Traceback" not in output
        newest = newest_checkpoint(small / "run" / "checkpoints")
        assert newest is not None
        output = runs.run("full", *options, "train.keep_checkpoints=1")
        assert f"going on after step {newest.step}" in output
        assert (small / "run" / "model.safetensors").is_file()
    finally:
        run_command("umount", small)


def wait_for_a_step(process: subprocess.Popen[str], metrics: Path) -> None:
    """Until the run has written a line more than there was; a run that ended has no more."""

    def written() -> int:
        return metrics.stat().st_size if metrics.exists() else 0

    before = written()
    while process.poll() is None and written() == before:
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("begun", [False, True], ids=["starting", "training"])
def test_a_signal_at_any_moment_ends_in_a_checkpoint_or_nothing_begun(
    runs: Runs, begun: bool
) -> None:
    """While it starts, while the loader starts; in a step, while saving."""
    name = f"signalled-{begun}"
    options = (f"train.max_steps={30 if begun else 6}", "train.save_every=1")
    chance = random.Random(3)
    ends = set()
    for _ in range(2):
        process = runs.start(name, *options, launcher=(sys.executable,))
        try:
            if begun:
                wait_for_a_step(process, runs.folder / name / "metrics.jsonl")
            time.sleep(chance.uniform(0, 0.4 if begun else 9))
            if process.poll() is None:
                process.send_signal(signal.SIGUSR1)
            output, _ = process.communicate(timeout=120)
        finally:
            stop(process)
        ends.add(process.returncode)
        assert "Traceback" not in output
    # Before it listens, the signal itself ends the process; once it trains, never.
    assert ends <= ({0, 75} if begun else {0, 75, -signal.SIGUSR1})
    assert 75 in ends or not begun
    runs.run(name, *options)
    calm = f"calm-{begun}"
    runs.run(calm, *options)
    assert runs.losses(name) == runs.losses(calm)
