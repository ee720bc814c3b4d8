"""Losses and gradients that are not finite: reported with their videos, and limited in number.

The engine refuses a step whose loss or gradient is not finite (engine/build.py) and nobody waits
for the device to say so; this looks at what happened whenever the loop logs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arvideo_ds.config import Recipe
from arvideo_ds.data.order import rank_positions
from arvideo_ds.errors import UserError
from arvideo_ds.planning.plan import RunPlan
from arvideo_ds.runs.run_folder import QUARANTINE, append_of_rank, read_metrics
from arvideo_ds.train.metrics import Reading

# A file for each rank (run_folder.append_of_rank).
REFUSED = "not_applied"
# A share means nothing before so many clips were seen.
_CLIPS_BEFORE_SKIP_LIMIT = 200


class Guard:
    """Counts over the whole run, earlier starts included; stops it above the recipe's limits."""

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        plan: RunPlan,
        *,
        rank: int,
        first_step: int,
        video_at: Callable[[int], str],
    ) -> None:
        self._folder, self._recipe, self._plan, self._rank = folder, recipe, plan, rank
        # Names the video at a run position.
        self._video_at = video_at
        self._in_a_row = 0
        self._totals = _totals_before(folder, first_step)

    def count(self, reading: Reading) -> dict[str, float]:
        """Add to the totals, which belong to the logged step."""
        self._totals["data/seen_total"] += reading.metrics["data/seen"]
        self._totals["data/skipped_total"] += reading.metrics["data/skipped"]
        self._totals["guard/refused_total"] += sum(reading.refused)
        return dict(self._totals)

    def require_health(self, done: int, metrics: dict[str, Any], reading: Reading) -> None:
        """Dump the steps that were not applied. Errors: `UserError` when it must not go on.

        All ranks have the same totals and so raise together.
        """
        self._look_at_steps(done, reading)
        share = metrics["data/skipped_total"] / metrics["data/seen_total"]
        limit = self._recipe.data.max_skipped_share
        if metrics["data/seen_total"] >= _CLIPS_BEFORE_SKIP_LIMIT and share > limit:
            raise UserError(
                f"{share:.1%} of the clips did not decode, above data.max_skipped_share={limit}. "
                f"The videos are in {self._folder / QUARANTINE}-rank-*.jsonl; check the shards, "
                "or raise the limit."
            )

    def _look_at_steps(self, done: int, reading: Reading) -> None:
        per_step = self._plan.accumulation
        for number, refused in enumerate(reading.refused):
            step = done - len(reading.refused) + 1 + number
            self._in_a_row = self._in_a_row + 1 if refused else 0
            if refused:
                self._dump(step, reading.losses[number * per_step : (number + 1) * per_step])
            if self._in_a_row >= self._recipe.train.max_refused_steps:
                raise UserError(
                    f"steps {step - self._in_a_row + 1} to {step} were not applied, since loss or "
                    f"gradient was not finite; that is train.max_refused_steps. The weights are "
                    f"those of the step before. Their videos and losses are in "
                    f"{self._folder / REFUSED}-rank-*.jsonl. Start another run (--output) with a "
                    "lower optim.base_lr, with optim.clip, or with train.precision=fp32 or bf16."
                )

    def _dump(self, step: int, losses: list[float]) -> None:
        """One line a rank; `losses` are null where they were not finite themselves."""
        batches = rank_positions(self._plan, rank=self._rank, first_step=step - 1)
        mine = [next(batches) for _ in losses]
        line = {
            "step": step,
            "rank": self._rank,
            "losses": [loss if math.isfinite(loss) else None for loss in losses],
            "videos": [[self._video_at(position) for position in batch] for batch in mine],
        }
        append_of_rank(self._folder, REFUSED, self._rank, [line])


def _totals_before(folder: Path, first_step: int) -> dict[str, float]:
    """Totals of earlier starts, up to the step that this one goes on from."""
    names = ("data/seen_total", "data/skipped_total", "guard/refused_total")
    before = [line for line in read_metrics(folder) if line["step"] <= first_step]
    last = before[-1] if before else {}
    return {name: float(last.get(name, 0)) for name in names}
