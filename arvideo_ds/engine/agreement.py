"""Small agreements between ranks that cost the training nothing."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def gather_over_ranks(values: list[float], device: torch.device) -> list[list[float]]:
    """Every rank's values, by rank; a collective, and a host sync: at log steps only."""
    own = torch.tensor(values, dtype=torch.float64, device=device)
    gathered = own.new_empty(dist.get_world_size() * len(values))
    dist.all_gather_into_tensor(gathered, own)
    rows: list[list[float]] = gathered.view(-1, len(values)).tolist()
    return rows


def gather_names(name: str) -> list[str]:
    """Every rank's name, by rank. Collective."""
    names: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(names, name)
    return names


class AnyRank:
    """Has any rank raised its flag? Known to all ranks at the same step, one step later.

    The question of a step is a one-number all-reduce on the CPU (gloo) that runs while the next
    step trains; asking again collects it. So no rank waits for it and the device never syncs.
    """

    def __init__(self, world_size: int) -> None:
        self._alone = world_size == 1
        self._group: Any = None if self._alone else dist.new_group(backend="gloo")
        self._pending: tuple[torch.Tensor, Any] | None = None

    def ask(self, flag: bool) -> bool:
        """Every rank calls it once a step; the answer is that of the step before."""
        if self._alone:
            return flag
        raised = self._collect()
        tensor = torch.tensor(int(flag))
        work = dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending = (tensor, work)
        return raised

    def finish(self) -> None:
        """Collect the last question, so that no collective is left under way. Every rank."""
        self._collect()

    def _collect(self) -> bool:
        if self._pending is None:
            return False
        (tensor, work), self._pending = self._pending, None
        work.wait()
        return bool(tensor.item())
