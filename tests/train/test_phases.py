"""A run of two phases, with clips and a batch of their own: one curve, resumed at any step."""

from __future__ import annotations

import os
import random

import pytest

from tests.train.conftest import Runs
from tests.train.test_resume import same_weights

pytestmark = pytest.mark.dist
# make test does a few; the figure of twenty is ARVIDEO_STOPS=20.
STOPS = int(os.environ.get("ARVIDEO_STOPS", "2"))
# Phase 1 takes 8 clips a step, phase 2 twice as many: on one rank in two micro-batches.
PHASES = (
    "train.max_steps=24",
    "train.save_every=1",
    "train.micro_batch=8",
    "phases=[{share: 0.5, data.size: 16, objective.cluster: [2, 2, 2], train.total_batch: 8},"
    " {share: 0.5}]",
)
BOUNDARY = 12


@pytest.mark.parametrize("ranks", [1, 2])
def test_resumed_across_the_boundary_a_run_is_equal_bit_for_bit(runs: Runs, ranks: int) -> None:
    """Stopped and killed at random steps around the boundary, the step before it among them."""
    whole, cut = f"whole-{ranks}", f"cut-{ranks}"
    output = runs.run(whole, *PHASES, ranks=ranks)
    assert "phase 1 of 2: steps 1 to 12, clips of 8x16x16 = 64 tokens" in output
    chance = random.Random(ranks)
    # Ranks agree on an interruption a step later, before the last one.
    steps = sorted({BOUNDARY, *(chance.randint(2, 21) for _ in range(STOPS - 1))})
    for step in steps:
        how = chance.choice(["interrupt", "kill"])
        runs.run(cut, *PHASES, ranks=ranks, fault=f"{how}:{step}:{step}:0", code=None)
    runs.run(cut, *PHASES, ranks=ranks)
    assert runs.losses(cut) == runs.losses(whole)
    assert same_weights(runs.folder / cut, runs.folder / whole)
    lines = runs.metrics(whole)
    assert [line["phase"] for line in lines] == [1] * BOUNDARY + [2] * BOUNDARY
    # 4 videos a step, then 8, of 48; the learning rate of 8 videos is twice that of 4.
    assert lines[BOUNDARY - 1]["epoch"] == pytest.approx(1)
    assert lines[-1]["epoch"] == pytest.approx(3)
    assert lines[-1]["loss/pretrain"] < lines[0]["loss/pretrain"]
