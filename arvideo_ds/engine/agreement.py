"""Collectives on values of the host: measurements, objects and a flag."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def gather_over_ranks(values: list[float], device: torch.device) -> list[list[float]]:
    """Every rank's values, by rank; a collective, and a host sync: at log steps only."""
    mine = torch.tensor(values, dtype=torch.float64, device=device)
    gathered = mine.new_empty(dist.get_world_size() * len(values))
    dist.all_gather_into_tensor(gathered, mine)
    rows: list[list[float]] = gathered.view(-1, len(values)).tolist()
    return rows


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, by rank. Collective."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


class AnyRank:
    """Whether any rank has raised its flag; all ranks know it at the same step, one step later.

    The all-reduce on the CPU (gloo) runs during the next step: no rank waits, no device syncs.
    """

    def __init__(self, world_size: int) -> None:
        self._alone = world_size == 1
        self._group: Any = None if self._alone else dist.new_group(backend="gloo")
        self._pending: tuple[torch.Tensor, Any] | None = None

    def ask(self, flag: bool) -> bool:
        """Send this step's flag; the answer of the step before. Every rank calls it once a step."""
        if self._alone:
            return flag
        raised = self.finish()
        tensor = torch.tensor(int(flag))
        work = dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending = (tensor, work)
        return raised

    def finish(self) -> bool:
        """Wait for the pending answer, so that no collective is under way. Collective."""
        if self._pending is None:
            return False
        (tensor, work), self._pending = self._pending, None
        work.wait()
        return bool(tensor.item())
