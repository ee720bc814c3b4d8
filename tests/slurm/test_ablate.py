"""scripts/ablate.py --slurm on a real cluster: an array of cells, and the tables afterwards."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slurm

GRID = """
title: One row
base: demo
overrides: [train.max_steps=3, train.total_batch=8, train.micro_batch=8, data.num_streams=4,
            data.workers=0, optim.warmup_steps=1]
probe_videos: [32, 16]
ablations: [{name: cluster, title: Cluster, rows: [{name: base}]}]
"""


def test_an_array_of_two_rank_cells_and_its_tables(
    cluster: Any, demo_shards: Path, tmp_path: Path
) -> None:
    grid, output = tmp_path / "grid.yaml", tmp_path / "out"
    grid.write_text(GRID)
    command = [
        sys.executable, "scripts/ablate.py", grid, "--seeds=1", f"--output={output}", "--slurm",
        f"--train={demo_shards / 'train'}", f"--test={demo_shards / 'test'}",
        "--sbatch=--nodes=2 --ntasks-per-node=1 --hold",
    ]  # fmt: skip
    said = cluster.call(*command)
    job = re.search(r"array (\d+): 2 cells", said)
    assert job, said
    assert f"array {job[1]} still runs; 2 of 2 cells are left" in cluster.call(*command)
    cluster.call("scontrol", "release", job[1])  # held until now: cells may end before a command
    results = output / "cells"
    log = output / f"slurm-{job[1]}_1.log"
    cluster.wait(lambda: len(list(results.glob("*/result.json"))) == 2, 180, "results", log)
    cluster.wait(lambda: not cluster.call("squeue", "--noheader"), 60, "end of the array", log)
    assert "2 rank(s) by srun" in log.read_text()
    assert not re.search(r"array \d+", cluster.call(*command))
    document = json.loads((output / "table.json").read_text())
    assert (document["finished"], document["failed"]) == (2, {})
