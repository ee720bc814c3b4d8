"""What a logged step says, and where it goes: the console, metrics.jsonl, W&B.

Names carry their unit; `loss/<task>`, `throughput/`, `time/`, `memory/`, `data/`.
"""

from __future__ import annotations

import json
import math
import secrets
import statistics
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from arvideo_ds.config.schema import WandbSettings
from arvideo_ds.data.clips import Skipped
from arvideo_ds.data.loader import Batch
from arvideo_ds.engine.agreement import gather_over_ranks
from arvideo_ds.files.atomic import finite, write_text
from arvideo_ds.files.json_lines import append_json_lines
from arvideo_ds.host import peak_resident_bytes
from arvideo_ds.runs.run_folder import (
    METRICS,
    QUARANTINE,
    append_of_rank,
    read_metrics,
)
from arvideo_ds.tasks import Task

_GIB = 2**30
# A rank whose forward pass takes so many times the median is named.
_STRAGGLES = 1.5


class Stopwatch:
    """Seconds between `start` and `stop`, summed; on a GPU timed there, and read without haste."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[Any] = []

    def start(self) -> None:
        self._mark()

    def stop(self) -> None:
        self._mark()

    def _mark(self) -> None:
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> float:
        """The sum so far. A host sync on a GPU."""
        pairs = list(zip(self._marks[::2], self._marks[1::2], strict=True))
        if self._on_gpu:
            torch.cuda.synchronize()
            return sum(start.elapsed_time(stop) for start, stop in pairs) / 1000
        return float(sum(stop - start for start, stop in pairs))


@dataclass
class Meter:
    """One rank's record since the last logged step; losses stay on the device until then."""

    device: torch.device
    task: str
    # So many consecutive ranks load the same clips.
    sharing: int = 1
    # One of each micro-step, and of each step: 1 where it was not applied.
    losses: list[torch.Tensor] = field(default_factory=list)
    refused: list[torch.Tensor] = field(default_factory=list)
    clips: int = 0
    skipped: int = 0
    data_wait_s: float = 0.0
    forward: Stopwatch = field(init=False)
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.forward = Stopwatch(self.device)

    def add(self, loss: torch.Tensor, batch: Batch) -> None:
        self.losses.append(loss.detach().float())
        self.clips += len(batch.keys)
        self.skipped += batch.num_skipped

    def read(self, hosts: list[str]) -> Reading:
        """What all ranks measured. Collective, and the loop's one host sync."""
        losses, refused = torch.stack(self.losses).tolist(), torch.stack(self.refused).tolist()
        finite = [loss for loss in losses if math.isfinite(loss)]
        forward_s = self.forward.seconds()
        # Clocked after the sync: work that was only queued would count as done.
        elapsed_s = time.perf_counter() - self.started
        own = [sum(finite), len(finite), self.clips, self.skipped]
        own += [self.data_wait_s, forward_s, elapsed_s]
        ranks = gather_over_ranks(own, self.device)
        *columns, waits_s, forwards_s, elapsed = map(list, zip(*ranks, strict=True))
        loss_sum, num_finite, clips, skipped = (sum(c[:: self.sharing]) for c in columns)
        steps, world_size, elapsed_mean_s = len(refused), len(ranks), sum(elapsed) / len(ranks)
        slowest = max(range(world_size), key=forwards_s.__getitem__)
        metrics = {
            f"loss/{self.task}": loss_sum / num_finite if num_finite else math.nan,
            "throughput/clips_per_s": clips / elapsed_mean_s,
            "throughput/clips_per_s_per_gpu": clips / elapsed_mean_s / world_size,
            "time/step_s": elapsed_mean_s / steps,
            "time/data_wait_pct": 100 * sum(waits_s) / sum(elapsed),
            **_spread("time/data_wait_s", waits_s, steps),
            **_spread("time/forward_s", forwards_s, steps),
            "memory/peak_gib": peak_memory_gib(self.device),
            "data/skipped": skipped,
            "data/seen": clips,
        }
        return Reading(metrics, losses, refused, slowest_host=hosts[slowest])


@dataclass(frozen=True)
class Reading:
    """Metrics over all ranks; this rank's losses by micro-step; per step 1 where not applied."""

    metrics: dict[str, Any]
    losses: list[float]
    refused: list[float]
    slowest_host: str


def _spread(name: str, seconds: list[float], steps: int) -> dict[str, float]:
    """The ranks' extremes per step: a slow host shows in the maximum."""
    return {
        f"{name}_min": min(seconds) / steps,
        f"{name}_median": statistics.median(seconds) / steps,
        f"{name}_max": max(seconds) / steps,
    }


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far: the GPU's allocations, or this process's resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _GIB
    return peak_resident_bytes() / _GIB


class Console:
    """One line a logged step, with rate and time left."""

    def __init__(self, steps: int, task: Task) -> None:
        self._steps, self._task = steps, task

    def log(self, metrics: dict[str, Any]) -> None:
        step = metrics["step"]
        left = timedelta(seconds=round((self._steps - step) * metrics["time/step_s"]))
        norm = metrics.get("grad_norm_preclip")
        parts = [
            f"step {step}/{self._steps}",
            f"epoch {metrics['epoch']:.2f}",
            f"loss {metrics[f'loss/{self._task.recipe.task}']:.4f}",
            f"lr {metrics['lr']:.2e}",
            *([f"grad {norm:.3f}"] if norm is not None else []),
            f"{metrics['throughput/clips_per_s']:.1f} clips/s",
            f"data wait {metrics['time/data_wait_pct']:.1f} %",
            f"{metrics['memory/peak_gib']:.2f} GiB",
            f"left {left}",
        ]
        start = "validation/"
        found = {k.removeprefix(start): v for k, v in metrics.items() if k.startswith(start)}
        if found:
            parts.append(self._task.metric_words(found))
        if metrics["data/skipped_total"]:
            parts.append(f"skipped {metrics['data/skipped_total']:.0f}")
        if metrics["guard/refused_total"]:
            parts.append(f"steps not applied {metrics['guard/refused_total']:.0f}")
        if metrics["time/forward_s_max"] > _STRAGGLES * metrics["time/forward_s_median"]:
            parts.append(
                f"slow host {metrics['slowest_host']}: forward "
                f"{metrics['time/forward_s_max']:.3f} s a step, median "
                f"{metrics['time/forward_s_median']:.3f} s"
            )
        print("  ".join(parts), flush=True)


class JsonLines:
    """metrics.jsonl: the truth about a run. A resumed run drops what it will do again."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self._path = folder / METRICS
        kept = [m for m in read_metrics(folder) if m["step"] <= first_step]
        write_text(self._path, "".join(json.dumps(finite(m)) + "\n" for m in kept))

    def log(self, metrics: dict[str, Any]) -> None:
        append_json_lines(self._path, [finite(metrics)])


class Wandb:
    """W&B on request, never fatal: a failure is said once and training goes on.

    settings: settled, so that the environment has been read.
    """

    def __init__(self, folder: Path, settings: WandbSettings, config: dict[str, Any]) -> None:
        self._run: Any = None
        try:
            import wandb

            # The id stays with the run, so a requeued job continues the same curve.
            id_file = folder / "wandb_id"
            run_id = id_file.read_text() if id_file.is_file() else secrets.token_hex(4)
            id_file.write_text(run_id)
            self._run = wandb.init(
                id=run_id,
                resume="allow",
                mode=settings.mode,
                project=settings.project,
                entity=settings.entity,
                group=settings.group,
                tags=list(settings.tags) or None,
                name=folder.name,
                dir=str(folder),
                config=config,
            )
            self._run.define_metric("*", step_metric="step")
        except Exception as error:  # whatever its network or login says
            self._give_up(error)

    def log(self, metrics: dict[str, Any]) -> None:
        if self._run is not None:
            try:
                self._run.log(metrics)
            except Exception as error:
                self._give_up(error)

    def close(self) -> None:
        """Write what is still under way."""
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        print(f"W&B is off for this run ({error}); metrics.jsonl goes on.", flush=True)


def quarantine(folder: Path, rank: int, skipped: list[Skipped]) -> None:
    """Append the videos that did not decode to the rank's own file."""
    if skipped:
        lines = [
            {"key": s.key, "kind": s.kind, "message": s.message, "rank": rank} for s in skipped
        ]
        append_of_rank(folder, QUARANTINE, rank, lines)
