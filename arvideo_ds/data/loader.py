"""Clips in batches, made by worker processes that are watched and replaced.

PyTorch's DataLoader keeps the order for any number of workers; order.py decides which positions
come, clips.py what a position is, this module what happens when a worker is lost.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import multiprocessing
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.context import BaseContext
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from typing_extensions import Self

from arvideo_ds.config import Recipe
from arvideo_ds.config.schema import DataSettings
from arvideo_ds.data.clips import (
    EvaluationClips,
    MixedClips,
    Skipped,
    TrainClips,
    VideoClips,
    Watch,
)
from arvideo_ds.data.order import rank_positions
from arvideo_ds.data.planes import to_rgb
from arvideo_ds.data.slots import Slots
from arvideo_ds.errors import UserError
from arvideo_ds.host import resident_bytes
from arvideo_ds.planning.plan import RunPlan
from arvideo_ds.shards.manifest import ShardSet
from arvideo_ds.shards.mix import AnyShards

# A rank with more cores keeps one for the trainer.
_CORES_FOR_WORKERS = 8
# How often the trainer checks its workers while it waits for them.
_POLL_S = 5
# Batches that the trainer has or waits for, beside those that the workers prepare.
_IN_USE = 3
# Of clips as planes.
_PACKED_DIMENSIONS = 4
_EXIT_S = 0.2
# So many lost workers without a batch in between end the run.
_MAX_LOST_IN_A_ROW = 3


@dataclass
class Batch:
    """Clips B F h w 3 (uint8), keys B (int64), labels B (int64, -1 = none), valid B (bool).

    With data.planes, clips on the host are B F 3h/2 w (planes.py). With heads, labels are B x
    heads. A video that did not decode has black, invalid clips: shapes stay fixed, the loss ignores
    them. num_skipped: number of such clips; skipped: their videos. first_key: of the first clip, on
    the host. With data.scores, scores B N (float32) and, from a tokenizer, codes B N (int64) along
    (time, row, column); 0 where a clip is not valid.
    """

    # Tensors that stay on the host.
    on_host: ClassVar[tuple[str, ...]] = ()

    clips: Tensor
    keys: Tensor
    labels: Tensor
    valid: Tensor
    num_skipped: int = 0
    skipped: list[Skipped] = field(default_factory=list)
    first_key: int = 0
    scores: Tensor | None = None
    codes: Tensor | None = None

    def to(self, device: torch.device) -> Self:
        """The same batch on a device, in RGB; the copy is asynchronous from pinned memory."""
        moved = self._map(lambda tensor: tensor.to(device, non_blocking=True))
        if moved.clips.ndim == _PACKED_DIMENSIONS:
            moved.clips = to_rgb(moved.clips)
        return moved

    def pin_memory(self) -> Self:
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        changed: dict[str, Any] = {
            name: change(value)
            for name, value in vars(self).items()
            if isinstance(value, Tensor) and name not in self.on_host
        }
        return dataclasses.replace(self, **changed)


class WorkerLostError(Exception):
    """A data worker hangs or died; `worker` is its number, None if unknown."""

    def __init__(self, kind: str, worker: int | None) -> None:
        super().__init__(kind, worker)
        self.kind, self.worker = kind, worker


def collate(videos: list[VideoClips], memory: Tensor | None = None) -> Batch:
    """Clips of several videos as one batch; the clips of a video stay together. memory: bytes for
    the clips, if they fit."""
    counts = torch.tensor([len(video.keys) for video in videos])
    clips = [clip for video in videos for clip in video.clips]
    valid = torch.tensor([video.skipped is None for video in videos]).repeat_interleave(counts)
    flat = [scores.flat() for video in videos for scores in video.scores or ()]
    return Batch(
        clips=torch.stack(clips, out=_place(len(clips), clips[0], memory)),
        keys=torch.tensor([key for video in videos for key in video.keys]),
        labels=torch.tensor([video.label for video in videos]).repeat_interleave(counts, dim=0),
        valid=valid,
        num_skipped=int((~valid).sum()),
        skipped=[video.skipped for video in videos if video.skipped is not None],
        first_key=videos[0].keys[0],
        scores=_stacked([scores for scores, _ in flat]),
        codes=_stacked([codes for _, codes in flat if codes is not None]),
    )


def _stacked(arrays: list[np.ndarray]) -> Tensor | None:
    return torch.from_numpy(np.stack(arrays)) if arrays else None


def _place(count: int, clip: Tensor, memory: Tensor | None) -> Tensor | None:
    """`memory`; or in a worker, memory shared with the trainer, so that the batch is not copied."""
    if memory is not None and count * clip.nbytes <= memory.nbytes:
        return memory[: count * clip.nbytes].view(count, *clip.shape)
    if get_worker_info() is None:
        return None
    storage = torch.UntypedStorage._new_shared(count * clip.nbytes, device=clip.device)
    return clip.new(storage).resize_(count, *clip.shape)


class TrainLoader:
    """Micro-batches of one rank from a step to the end of its phase, whose recipe it has.

    When a worker hangs for data.timeout_s or dies, its video is reported, all workers are replaced,
    and the order continues. A video that hung, or on which a worker died twice, is then skipped.
    left_out: such videos of earlier starts. clips, together: data set and collate function.
    """

    def __init__(
        self,
        shards: AnyShards,
        recipe: Recipe,
        plan: RunPlan,
        *,
        rank: int,
        first_step: int,
        num_workers: int,
        pin_memory: bool,
        left_out: Mapping[str, str] | None = None,
        clips: Callable[..., TrainClips | MixedClips] = TrainClips,
        together: Callable[..., Batch] = collate,
    ) -> None:
        self._timeout_s = recipe.data.timeout_s
        self._dataset = clips(shards, recipe, num_workers=num_workers, left_out=left_out)
        self._together = together
        self._crashes: Counter[str | None] = Counter()
        self.decoder = self._dataset.decoder
        self._positions = partial(rank_positions, plan, rank=rank, first_step=first_step)
        micro_batch = plan.part_at(first_step).plan.micro_batch
        bytes_per_pixel = 1.5 if recipe.data.planes else 3
        batch_bytes = int(micro_batch * math.prod(recipe.geometry.clip) * bytes_per_pixel)
        prefetch = _prefetch(recipe.data, num_workers, batch_bytes)
        self._new_slots = partial(Slots, num_workers * (prefetch or 0) + _IN_USE, batch_bytes)
        self._options: dict[str, Any] = {
            "batch_size": None,
            "num_workers": num_workers,
            "pin_memory": pin_memory,
            "timeout": min(_POLL_S, self._timeout_s) if num_workers else 0,
            "prefetch_factor": prefetch,
            "worker_init_fn": _start_worker,
            "multiprocessing_context": _context() if num_workers else None,
        }
        self._workers: list[Any] = []

    def __iter__(self) -> Generator[Batch, None, None]:
        delivered = lost_in_a_row = 0
        while True:
            try:
                with closing(self._batches(delivered)) as batches:
                    for batch in batches:
                        delivered, lost_in_a_row = delivered + 1, 0
                        yield batch
                return
            except WorkerLostError as lost:
                lost_in_a_row += 1
                self._replace(lost, lost_in_a_row)

    def video_at(self, run_position: int) -> str:
        """Key of the video at a run position."""
        return self._dataset.key_at(run_position)

    def videos_by_source(self, run_position: int) -> dict[str, int]:
        """Videos before a run position, by source of a mixture."""
        return self._dataset.videos_by_source(run_position)

    @property
    def worker_pids(self) -> list[int]:
        """The processes of the workers now."""
        return [worker.pid for worker in self._workers]

    def workers_resident_gib(self) -> float:
        """Memory of the workers now; shared pages count in each."""
        return sum(map(resident_bytes, self.worker_pids)) / 2**30

    def _batches(self, delivered: int) -> Generator[Batch, None, None]:
        sampler: Iterator[Any] = itertools.islice(self._positions(), delivered, None)
        batch_of: _Batches = _Batches(self._dataset, self._together)
        if self._options["num_workers"]:
            slots = self._new_slots()
            sampler = ((slots.take(), positions) for positions in sampler)
            batch_of = _BatchesInSlots(self._dataset, self._together, slots)
        handler = signal.getsignal(signal.SIGCHLD)
        batches: Any = iter(DataLoader(batch_of, sampler=sampler, **self._options))
        if threading.current_thread() is threading.main_thread():
            # torch's handler would raise a worker's death at any place of the trainer's code.
            signal.signal(signal.SIGCHLD, handler)
        self._workers = list(getattr(batches, "_workers", []))
        try:
            while (batch := self._next(batches)) is not None:
                yield batch
        finally:
            # After torch's own shutdown, kill: workers ignore SIGTERM, and one may hang in native
            # code. They have no state to save.
            if self._workers:
                batches._shutdown_workers()
            for worker in self._workers:
                worker.kill()

    def _next(self, batches: Iterator[Batch]) -> Batch | None:
        limit = time.monotonic() + self._timeout_s
        while True:
            try:
                return _checked(next(batches, None))
            except (RuntimeError, EOFError, OSError) as error:
                if not isinstance(error, RuntimeError):
                    # A worker died while it sent a batch; its files close before it has ended.
                    time.sleep(_EXIT_S)
                dead = [n for n, worker in enumerate(self._workers) if not worker.is_alive()]
                if dead:
                    raise WorkerLostError("crash", dead[0]) from error
                if "timed out" not in str(error):
                    raise
                if time.monotonic() > limit:
                    for worker in self._dataset.watch.busy():
                        self._workers[worker].kill()  # torch waits ten seconds for one that hangs
                    raise WorkerLostError("hang", self._dataset.watch.longest()) from error

    def _replace(self, lost: WorkerLostError, in_a_row: int) -> None:
        """Report the loss and exclude the video that caused it. Errors: `UserError` after several
        losses without a batch in between."""
        position = None if lost.worker is None else self._dataset.watch.position(lost.worker)
        key = None if position is None else self.video_at(position)
        did = "died" if lost.kind == "crash" else f"hung for data.timeout_s={self._timeout_s} s"
        what = f"data worker {lost.worker} {did} on {f'video {key}' if key else 'no known video'}"
        if in_a_row >= _MAX_LOST_IN_A_ROW:
            raise UserError(
                f"{what}, the {in_a_row}th such loss without a batch in between (decoder "
                f"{self.decoder}). Memory may be short, or the disk hangs. Try fewer data.workers, "
                "another data.decoder, or a larger data.timeout_s."
            )
        self._crashes[key] += lost.kind == "crash"
        guilty = key is not None and (lost.kind == "hang" or self._crashes[key] > 1)
        if guilty:
            self._dataset.left_out[str(key)] = lost.kind
        more = "; the video is skipped from now on" if guilty else ""
        print(f"note: {what}; all workers are replaced{more}.", flush=True)
        self._dataset.watch = Watch(len(self._workers))


def evaluation_batches(num_samples: int, batch_size: int) -> list[list[int]]:
    """All sample numbers in order, `batch_size` at a time; the last batch may be smaller."""
    numbers = list(range(num_samples))
    return [numbers[start : start + batch_size] for start in range(0, num_samples, batch_size)]


def evaluation_loader(
    shards: ShardSet,
    recipe: Recipe,
    batches: list[list[int]],
    *,
    views: tuple[int, int] = (1, 1),
    num_workers: int,
) -> DataLoader[VideoClips]:
    """Batches of `EvaluationClips`; `Batch.keys` are the sample numbers, one per view."""
    clips = EvaluationClips(shards, recipe, views=views)
    return loader_of(clips, recipe, batches, num_workers=num_workers, together=collate)


def loader_of(
    clips: Dataset[Any],
    recipe: Recipe,
    batches: list[list[int]],
    *,
    num_workers: int,
    together: Callable[..., Batch],
) -> DataLoader[Any]:
    """The given batches of a data set, in their order. Errors while iterating: `UserError`."""
    return _Loader(
        _Batches(clips, together),
        sampler=batches,
        batch_size=None,
        num_workers=num_workers,
        # A decoder that hangs ends the evaluation.
        timeout=recipe.data.timeout_s if num_workers else 0,
        worker_init_fn=_start_worker,
        multiprocessing_context=_context() if num_workers else None,
    )


class _Batches(Dataset[Any]):
    """Positions of a batch -> the batch, or a `UserError` as an item: raised in a worker, torch
    would bury its message in a traceback."""

    def __init__(self, clips: Dataset[Any], together: Callable[..., Batch]) -> None:
        self._clips, self._together = clips, together

    def __getitem__(self, positions: list[int]) -> Batch | UserError:
        return self._batch(positions)

    def _batch(self, positions: list[int], memory: Tensor | None = None) -> Batch | UserError:
        try:
            return self._together([self._clips[position] for position in positions], memory)
        except UserError as error:
            return error


class _BatchesInSlots(_Batches):
    """The same in a worker, from (slot or None, positions); clips are in the slot."""

    def __init__(self, clips: Dataset[Any], together: Callable[..., Batch], slots: Slots) -> None:
        super().__init__(clips, together)
        self._slots = slots

    def __getitem__(self, place: Any) -> Batch | UserError:
        slot, positions = place
        if slot is None:
            return self._batch(positions)
        memory = self._slots.memory(slot)
        batch = self._batch(positions, memory)
        if isinstance(batch, Batch) and batch.clips.data_ptr() == memory.data_ptr():
            filled = self._slots.filled(slot, batch.clips)
            batch.clips = filled  # type: ignore[assignment]  # a tensor in the trainer
        return batch


def _checked(batch: Any) -> Any:
    if isinstance(batch, UserError):
        raise batch
    return batch


class _Loader(DataLoader[Any]):
    def __iter__(self) -> Any:
        return map(_checked, super().__iter__())


def _prefetch(data: DataSettings, num_workers: int, batch_bytes: int) -> int | None:
    """Batches ahead per worker: data.prefetch, limited by data.prefetch_mib, at least one."""
    if not num_workers:
        return None
    allowed = int(data.prefetch_mib * 2**20 / (num_workers * batch_bytes))
    return max(1, min(data.prefetch, allowed))


def worker_count(recipe: Recipe, *, cores: int) -> int:
    """data.workers; for "auto" the cores of this rank.

    Above 8: less one, and at most one per batch that data.prefetch_mib allows.
    """
    if recipe.data.workers != "auto":
        return recipe.data.workers
    batch_bytes = recipe.train.micro_batch * math.prod(recipe.geometry.clip) * 3
    allowed = min(cores - 1, recipe.data.prefetch_mib * 2**20 // batch_bytes)
    return max(1, min(cores, max(_CORES_FOR_WORKERS, allowed)))


class _Flag:
    """An event without a lock, by which DataLoader ends its workers.

    A worker that is killed during `multiprocessing.Event.is_set` keeps the event's lock, and
    DataLoader then waits for it forever.
    """

    def __init__(self) -> None:
        self._value = torch.zeros(1, dtype=torch.uint8).share_memory_()

    def set(self) -> None:
        self._value.fill_(1)

    def is_set(self) -> bool:
        return bool(self._value)


def _context() -> BaseContext:
    """Python's way to start processes, with `_Flag` as event."""
    context: Any = copy.copy(multiprocessing.get_context())
    context.Event = _Flag
    return context


def _start_worker(_worker: int) -> None:
    # The workers are the parallelism.
    torch.set_num_threads(1)
    # Signals reach whole process groups. Only the trainer handles them; a worker that died of one
    # would lose the last batches before the final checkpoint.
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
