"""Metrics of a logged step, and their own sinks: the console, metrics.jsonl.

Names end with their unit; `loss/<task>`, `throughput/`, `time/`, `memory/`, `data/`.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from arvideo_ds.config.schema import TrainSettings
from arvideo_ds.data.clips import Skipped
from arvideo_ds.data.loader import Batch
from arvideo_ds.engine.agreement import gather_over_ranks
from arvideo_ds.files.atomic import finite, write_text
from arvideo_ds.files.json_lines import append_json_lines
from arvideo_ds.host import peak_resident_bytes
from arvideo_ds.planning.gpus import peak_of
from arvideo_ds.runs.run_folder import METRICS, QUARANTINE, append_of_rank, read_metrics
from arvideo_ds.tasks import Task

# The console names a host whose forward pass takes this many times the median.
_STRAGGLES = 1.5
SHARE_OF_PEAK = "throughput/share_of_peak"
# Over ranks: a slow host shows in the maximum.
_SPREAD: dict[str, Any] = {"min": min, "median": statistics.median, "max": max}


def peak_tflops(train: TrainSettings, device: torch.device) -> float | None:
    """Of one GPU: train.peak_tflops, or that of its name in the table of GPUs."""
    if train.peak_tflops is not None or device.type != "cuda":
        return train.peak_tflops
    return peak_of(torch.cuda.get_device_name(device), train.precision)


class Stopwatch:
    """Sum of the seconds between `start` and `stop`; on a GPU by CUDA events."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[Any] = []

    def start(self) -> None:
        if self._on_gpu:
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record()
        else:
            self._marks.append(time.perf_counter())

    stop = start

    def seconds(self) -> float:
        """The sum so far. A host sync on a GPU."""
        pairs = list(zip(self._marks[::2], self._marks[1::2], strict=True))
        if self._on_gpu:
            torch.cuda.synchronize()
            return sum(start.elapsed_time(stop) for start, stop in pairs) / 1000
        return float(sum(stop - start for start, stop in pairs))


class Meter:
    """One rank's measurements since the last logged step; losses stay on the device until then.

    sharing: number of consecutive ranks that load the same clips. gflops, teacher_gflops: of a
    clip's forward pass, of the model and of a frozen teacher; passes: cost of the model's forward
    and backward in forward passes. peak_tflops: of a GPU, if known.
    """

    def __init__(
        self,
        device: torch.device,
        task: str,
        sharing: int = 1,
        *,
        gflops: float = 0.0,
        teacher_gflops: float = 0.0,
        passes: float = 3,
        peak_tflops: float | None = None,
    ) -> None:
        self._device, self._task, self._sharing = device, task, sharing
        # Of a step: forward and backward; what is recomputed does not count.
        self._gflops, self._peak_tflops = passes * gflops + teacher_gflops, peak_tflops
        # A loss per micro-step; per step 1 where it was not applied.
        self.losses: list[torch.Tensor] = []
        self.refused: list[torch.Tensor] = []
        self.data_wait_s = 0.0
        self.forward = Stopwatch(device)
        self._clips = self._skipped = 0
        self._started = time.perf_counter()

    def add(self, loss: torch.Tensor, batch: Batch) -> None:
        self.losses.append(loss.detach().float())
        self._clips += len(batch.keys)
        self._skipped += batch.num_skipped

    def read(self, hosts: list[str]) -> Reading:
        """Measurements of all ranks, by their `hosts`. Collective, and the loop's one host sync."""
        losses, refused = torch.stack(self.losses).tolist(), torch.stack(self.refused).tolist()
        finite = [loss for loss in losses if math.isfinite(loss)]
        forward_s = self.forward.seconds()
        # Timed after the sync, so that queued work is included.
        elapsed_s = time.perf_counter() - self._started
        mine = [sum(finite), len(finite), self._clips, self._skipped]
        mine += [self.data_wait_s, forward_s, elapsed_s]
        ranks = gather_over_ranks(mine, self._device)
        *columns, waits_s, forwards_s, elapsed = map(list, zip(*ranks, strict=True))
        loss_sum, num_finite, clips, skipped = (sum(c[:: self._sharing]) for c in columns)
        steps, world_size, elapsed_mean_s = len(refused), len(ranks), sum(elapsed) / len(ranks)
        slowest = max(range(world_size), key=forwards_s.__getitem__)
        on_gpu = self._device.type == "cuda"
        clips_per_s_per_gpu = clips / elapsed_mean_s / world_size
        tflops = self._gflops * clips_per_s_per_gpu / 1000
        share = {} if self._peak_tflops is None else {SHARE_OF_PEAK: tflops / self._peak_tflops}
        peak = torch.cuda.max_memory_allocated(self._device) if on_gpu else peak_resident_bytes()
        metrics = {
            f"loss/{self._task}": loss_sum / num_finite if num_finite else math.nan,
            "throughput/clips_per_s": clips / elapsed_mean_s,
            "throughput/clips_per_s_per_gpu": clips_per_s_per_gpu,
            "throughput/tflops_per_gpu": tflops,
            **share,
            "time/step_s": elapsed_mean_s / steps,
            "time/data_wait_pct": 100 * sum(waits_s) / sum(elapsed),
            **{f"time/data_wait_s_{n}": kind(waits_s) / steps for n, kind in _SPREAD.items()},
            **{f"time/forward_s_{n}": kind(forwards_s) / steps for n, kind in _SPREAD.items()},
            "memory/peak_gib": peak / 2**30,
            "data/skipped": skipped,
            "data/seen": clips,
            "slowest_host": hosts[slowest],
        }
        return Reading(metrics, losses, refused)


@dataclass(frozen=True)
class Reading:
    """Metrics over all ranks, and this rank's `losses` and `refused` as in `Meter`."""

    metrics: dict[str, Any]
    losses: list[float]
    refused: list[float]


class Console:
    """Prints one line per logged step, with throughput and time left."""

    def __init__(self, steps: int, task: Task) -> None:
        self._steps, self._task = steps, task
        self._compile_s = 0.0

    def log(self, metrics: dict[str, Any]) -> None:
        compile_s = metrics.get("time/compile_s", 0.0)
        if compile_s > self._compile_s:
            print(f"torch.compile took {compile_s - self._compile_s:.1f} s", flush=True)
            self._compile_s = compile_s
        left_s = (self._steps - metrics["step"]) * metrics["time/step_s"]
        norm, share = metrics.get("grad_norm_preclip"), metrics.get(SHARE_OF_PEAK)
        parts = [
            f"step {metrics['step']}/{self._steps}",
            f"epoch {metrics['epoch']:.2f}",
            f"loss {metrics[f'loss/{self._task.recipe.task}']:.4f}",
            f"lr {metrics['lr']:.2e}",
            *([f"grad {norm:.3f}"] if norm is not None else []),
            f"{metrics['throughput/clips_per_s']:.1f} clips/s",
            *([f"{share:.0%} of peak"] if share is not None else []),
            f"data wait {metrics['time/data_wait_pct']:.1f} %",
            f"{metrics['memory/peak_gib']:.2f} GiB",
            # The first step starts processes and compiles, so its time predicts nothing.
            *([f"left {timedelta(seconds=round(left_s))}"] if metrics["step"] > 1 else []),
        ]
        start = "validation/"
        validated = {k.removeprefix(start): v for k, v in metrics.items() if k.startswith(start)}
        if validated:
            parts.append(self._task.metric_words(validated))
        if metrics["data/skipped_total"]:
            parts.append(f"skipped {metrics['data/skipped_total']:.0f}")
        if metrics["guard/refused_total"]:
            parts.append(f"steps not applied {metrics['guard/refused_total']:.0f}")
        slowest_s, median_s = metrics["time/forward_s_max"], metrics["time/forward_s_median"]
        if slowest_s > _STRAGGLES * median_s:
            host = metrics["slowest_host"]
            parts.append(
                f"slow host {host}: forward {slowest_s:.3f} s a step, median {median_s:.3f} s"
            )
        print("  ".join(parts), flush=True)


class JsonLines:
    """metrics.jsonl. A resumed run drops the lines of steps that it will repeat."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self._path = folder / METRICS
        kept = [m for m in read_metrics(folder) if m["step"] <= first_step]
        write_text(self._path, "".join(json.dumps(finite(m)) + "\n" for m in kept))

    def log(self, metrics: dict[str, Any]) -> None:
        append_json_lines(self._path, [finite(metrics)])


def quarantine(folder: Path, rank: int, skipped: list[Skipped]) -> None:
    """Append the videos that did not decode to the rank's file."""
    if skipped:
        append_of_rank(folder, QUARANTINE, rank, [{**asdict(s), "rank": rank} for s in skipped])
