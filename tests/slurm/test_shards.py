"""arvideo shards in parts on a real cluster: tasks of srun, one killed, repeated by an array."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from arvideo_ds.shards.datasets import Source, read_listing
from arvideo_ds.shards.writer import ShardJob, write_shards
from tests.conftest import ROOT

pytestmark = pytest.mark.slurm

# Part 2 loses its first process in its second shard.
KILLED = """
import os, runpy, signal, sys
from arvideo_ds.shards import writer

real_write_shard, shards = writer.write_shard, []

def write_shard(*arguments):
    shards.append(1)
    if os.environ["SLURM_PROCID"] == "1" and len(shards) == 2:
        (arguments[0] / (arguments[1] + ".partial")).write_bytes(b"half a shard")
        os.kill(os.getpid(), signal.SIGKILL)
    return real_write_shard(*arguments)

writer.write_shard = write_shard
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_four_parts_on_two_nodes_write_the_bytes_of_one_process(
    cluster: Any, demo_shards: Path, tmp_path: Path
) -> None:
    """Part 2 is killed; the array of docs/data.md repeats it and writes the manifest."""
    videos, output, wrapper = (
        demo_shards / "videos" / "train",
        tmp_path / "parts",
        tmp_path / "w.py",
    )
    wrapper.write_text(KILLED)
    listing = read_listing("folder", Source(videos))
    write_shards(ShardJob("folder", None, listing, tmp_path / "whole", None, 4, 0, 1, 60.0))
    command = [
        str(ROOT / "data_tools" / "make_shards.py"), "--dataset=folder", f"--videos={videos}",
        "--video=copy", "--samples_per_shard=4", "--workers=1", f"--output={output}",
    ]  # fmt: skip
    tasks = ("srun", "--nodes=2", "--ntasks=4", "--label", "--kill-on-bad-exit=0")
    said = cluster.call(*tasks, sys.executable, wrapper, *command, "--part=slurm", check=False)
    for part in (1, 3, 4):
        assert f"{part - 1}: {output}: part {part}/4 is complete" in said
    assert "part 2/4 is complete" not in said
    assert not (output / "manifest.json").exists()
    assert len(list(output.glob("*.tar"))) == 10, said
    assert len(list(output.glob("*.partial"))) == 1
    line, log = " ".join([sys.executable, *command]), tmp_path / "part.log"
    job = cluster.call(
        "sbatch", "--parsable", "--array=2", f"--output={log}",
        f"--wrap={line} --part $SLURM_ARRAY_TASK_ID/4",
    ).strip()  # fmt: skip
    cluster.wait(lambda: cluster.fact(job, "JobState") == "COMPLETED", 30, "end of the part", log)
    assert "part 2/4 is complete: 12 videos in 3 shards, 1 of them from an earlier run" in (
        log.read_text()
    )
    assert contents(output) == contents(tmp_path / "whole")
