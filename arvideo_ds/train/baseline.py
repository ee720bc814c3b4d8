"""The loss of a model that predicts the mean of the targets; a run must fall below it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from arvideo_ds.data.loader import Batch
from arvideo_ds.engine.agreement import gather_over_ranks

# In run.json, checkpoints and summary.json.
BASELINE = "baseline_loss"


class Baseline:
    """Measured once, on every rank's first batch, and read at the first log step.

    known: the loss of an earlier start, the same on all ranks; then nothing is measured. measure:
    a batch -> sum over clips of that loss and number of clips, 2, on the device; None where the
    task has no such loss. keep: called with the loss once it is known.
    """

    def __init__(
        self,
        known: float | None,
        measure: Callable[[Batch], Tensor] | None,
        keep: Callable[[float], None],
    ) -> None:
        self._measure = measure if known is None else None
        self._keep = keep
        self._sums: Tensor | None = None

    def see(self, batch: Batch) -> None:
        """Call with every batch. No host sync."""
        if self._measure is not None and self._sums is None:
            self._sums = self._measure(batch)

    def read(self, device: torch.device) -> None:
        """Call at every log step. Collective, and a host sync, the first time only."""
        if self._sums is None:
            return
        ranks = gather_over_ranks(self._sums.tolist(), device)
        loss, clips = (sum(column) for column in zip(*ranks, strict=True))
        self._sums = None
        if clips:  # else no clip of this batch decoded on any rank: measure the next batch
            self._measure = None
            self._keep(loss / clips)
