"""Steps that the engine refused (engine/build.py) and videos that did not decode: their limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from arvideo_ds.data.order import rank_positions
from arvideo_ds.errors import UserError
from arvideo_ds.runs.run_folder import QUARANTINE, append_of_rank, read_metrics
from arvideo_ds.train.metrics import Reading
from arvideo_ds.train.settle import RunSettings

# A file for each rank (run_folder.append_of_rank).
REFUSED = "not_applied"
# The share of skipped clips is checked from this number of clips on.
_CLIPS_BEFORE_SKIP_LIMIT = 200
_TOTALS = ("data/seen_total", "data/skipped_total", "guard/refused_total")


class Guard:
    """Counts over the whole run, earlier starts included. video_at: run position -> video."""

    def __init__(
        self, settings: RunSettings[Any], rank: int, first_step: int, video_at: Callable[[int], str]
    ) -> None:
        self._settings, self._rank, self._video_at = settings, rank, video_at
        self._in_a_row = 0
        # Totals of earlier starts, up to the step that this one resumes from.
        before = [m for m in read_metrics(settings.folder) if m["step"] <= first_step]
        last = before[-1] if before else {}
        self._totals = {name: float(last.get(name, 0)) for name in _TOTALS}

    def count(self, reading: Reading) -> dict[str, float]:
        """Add a reading; the new totals."""
        self._totals["data/seen_total"] += reading.metrics["data/seen"]
        self._totals["data/skipped_total"] += reading.metrics["data/skipped"]
        self._totals["guard/refused_total"] += sum(reading.refused)
        return dict(self._totals)

    def require_health(self, done: int, metrics: dict[str, Any], reading: Reading) -> None:
        """Record refused steps. Errors: `UserError` above a limit, on all ranks at once."""
        self._check_steps(done, reading)
        share = metrics["data/skipped_total"] / metrics["data/seen_total"]
        limit = self._settings.recipe.data.max_skipped_share
        if metrics["data/seen_total"] >= _CLIPS_BEFORE_SKIP_LIMIT and share > limit:
            raise UserError(
                f"{share:.1%} of the clips did not decode, above data.max_skipped_share={limit}. "
                f"The videos are in {self._settings.folder / QUARANTINE}-rank-*.jsonl; check the "
                "shards, or raise the limit."
            )

    def _check_steps(self, done: int, reading: Reading) -> None:
        per_step = self._settings.plan.part_at(done - 1).plan.accumulation
        for number, refused in enumerate(reading.refused):
            step = done - len(reading.refused) + 1 + number
            self._in_a_row = self._in_a_row + 1 if refused else 0
            if refused:
                self._record(step, reading.losses[number * per_step : (number + 1) * per_step])
            if self._in_a_row >= self._settings.recipe.train.max_refused_steps:
                raise UserError(
                    f"steps {step - self._in_a_row + 1} to {step} were not applied, since loss or "
                    f"gradient was not finite; that is train.max_refused_steps. The weights are "
                    f"those of the step before. Their videos and losses are in "
                    f"{self._settings.folder / REFUSED}-rank-*.jsonl. Start another run (--output) "
                    "with a lower optim.base_lr, with optim.clip, or with train.precision=fp32 or "
                    "bf16."
                )

    def _record(self, step: int, losses: list[float]) -> None:
        batches = rank_positions(self._settings.plan, rank=self._rank, first_step=step - 1)
        line = {
            "step": step,
            "rank": self._rank,
            "losses": [loss if math.isfinite(loss) else None for loss in losses],
            "videos": [[self._video_at(position) for position in next(batches)] for _ in losses],
        }
        append_of_rank(self._settings.folder, REFUSED, self._rank, [line])
