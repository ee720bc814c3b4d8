"""A run of two phases, with clips and a batch of their own: one curve, resumed at any step."""

from __future__ import annotations

import os
import random

import pytest

from tests.train.conftest import Runs
from tests.train.test_resume import same_weights, trained, working_folder

pytestmark = pytest.mark.dist
# make test does a few; the figure of twenty is ARVIDEO_STOPS=20.
STOPS = int(os.environ.get("ARVIDEO_STOPS", "2"))
LENGTH = max(24, 4 * STOPS)
BOUNDARY = LENGTH // 2
# Phase 1 takes 8 clips a step, phase 2 twice as many: on one rank in two micro-batches.
PHASES = (
    f"train.max_steps={LENGTH}",
    "train.save_every=1",
    "train.total_batch=16",
    "train.micro_batch=8",
    "phases=[{share: 0.5, data.size: 16, objective.cluster: [2, 2, 2], train.total_batch: 8},"
    " {share: 0.5}]",
)


@pytest.mark.parametrize("ranks", [1, 2])
def test_resumed_across_the_boundary_a_run_is_equal_bit_for_bit(runs: Runs, ranks: int) -> None:
    """Stopped and killed at random steps around the boundary, the step before it among them."""
    whole, cut = f"whole-{ranks}", f"cut-{ranks}"
    output = runs.run(whole, *PHASES, ranks=ranks)
    assert f"phase 1 of 2: steps 1 to {BOUNDARY}, clips of 8x16x16 = 64 tokens" in output
    chance = random.Random(ranks)
    # Two steps apart and before the last one: ranks agree on an interruption a step later.
    steps = {BOUNDARY, *chance.sample(range(2, LENGTH - 2, 2), STOPS - 1)}
    for step in sorted(steps):
        how = chance.choice(["interrupt", "kill"])
        runs.run(cut, *PHASES, ranks=ranks, fault=f"{how}:{step}:{step}:0", code=None)
    runs.run(cut, *PHASES, ranks=ranks)
    assert runs.losses(cut) == runs.losses(whole)
    assert same_weights(runs.folder / cut, runs.folder / whole)
    lines = runs.metrics(whole)
    assert [line["phase"] for line in lines] == [1] * BOUNDARY + [2] * BOUNDARY
    # 4 videos a step, then 8, of 48.
    assert lines[BOUNDARY - 1]["epoch"] == pytest.approx(4 * BOUNDARY / 48)
    assert lines[-1]["epoch"] == pytest.approx(12 * BOUNDARY / 48)
    assert lines[-1]["loss/pretrain"] < lines[0]["loss/pretrain"]


@pytest.mark.slow
def test_other_ranks_and_stages_go_on_across_the_boundary(runs: Runs) -> None:
    """With the same clips in every step, and one curve."""
    whole, cut = working_folder(runs, "all"), working_folder(runs, "parts")
    runs.run("all", *PHASES, ranks=2, fault="none:0:0:0", cwd=whole)
    for ranks, stage, stop_at in [(2, "zero0", 4), (1, "zero3", 14), (4, "zero1", None)]:
        fault = "none:0:0:0" if stop_at is None else f"interrupt:{stop_at}:{stop_at}:0"
        code = 0 if stop_at is None else None
        runs.run("parts", *PHASES, ranks=ranks, stage=stage, fault=fault, cwd=cut, code=code)
    assert trained(cut) == trained(whole)
    counts = [len(clips) for _, clips in sorted(trained(cut).items())]
    assert counts == [8] * BOUNDARY + [16] * BOUNDARY
    pairs = zip(runs.losses("parts"), runs.losses("all"), strict=True)
    assert max(abs(a - b) / b for a, b in pairs) <= 1e-4
