"""What a logged step says, and where it goes: the console, metrics.jsonl, W&B.

Names carry their unit; `loss/<task>`, `throughput/`, `time/`, `memory/`, `data/`.
"""

from __future__ import annotations

import json
import resource
import secrets
import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from arvideo_ds.config.schema import WandbSettings
from arvideo_ds.data.clips import Skipped
from arvideo_ds.data.loader import Batch
from arvideo_ds.engine.agreement import sum_over_ranks
from arvideo_ds.train.run_folder import METRICS, QUARANTINE, read_metrics

_GIB = 2**30


@dataclass
class Meter:
    """One rank's sums since the last logged step; losses stay on the device until then."""

    device: torch.device
    loss: torch.Tensor = field(init=False)
    micro_steps: int = 0
    steps: int = 0
    clips: int = 0
    skipped: int = 0
    data_wait_s: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.loss = torch.zeros((), device=self.device)

    def add(self, loss: torch.Tensor, batch: Batch) -> None:
        self.loss += loss.detach().float()
        self.micro_steps += 1
        self.clips += len(batch.keys)
        self.skipped += batch.num_skipped

    def reduce(self, world_size: int) -> dict[str, float]:
        """Means over all ranks. Collective, and the loop's one host sync."""
        loss_sum = float(self.loss)
        # Clocked after the sync: work that was only queued would count as done.
        elapsed_s = time.perf_counter() - self.started
        loss_sum, micro_steps, clips, skipped, wait_s, elapsed_sum_s = sum_over_ranks(
            [loss_sum, self.micro_steps, self.clips, self.skipped, self.data_wait_s, elapsed_s],
            self.device,
        )
        elapsed_mean_s = elapsed_sum_s / world_size
        return {
            "loss/pretrain": loss_sum / micro_steps,
            "throughput/clips_per_s": clips / elapsed_mean_s,
            "throughput/clips_per_s_per_gpu": clips / elapsed_mean_s / world_size,
            "time/step_s": elapsed_mean_s / self.steps,
            "time/data_wait_pct": 100 * wait_s / elapsed_sum_s,
            "memory/peak_gib": peak_memory_gib(self.device),
            "data/skipped": skipped,
            "data/seen": clips,
        }


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far: the GPU's allocations, or this process's resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GIB


class Console:
    """One line a logged step, with rate and time left."""

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def log(self, metrics: dict[str, Any]) -> None:
        step = metrics["step"]
        left = timedelta(seconds=round((self._steps - step) * metrics["time/step_s"]))
        norm = metrics.get("grad_norm_preclip")
        parts = [
            f"step {step}/{self._steps}",
            f"epoch {metrics['epoch']:.2f}",
            f"loss {metrics['loss/pretrain']:.4f}",
            f"lr {metrics['lr']:.2e}",
            *([f"grad {norm:.3f}"] if norm is not None else []),
            f"{metrics['throughput/clips_per_s']:.1f} clips/s",
            f"data wait {metrics['time/data_wait_pct']:.1f} %",
            f"{metrics['memory/peak_gib']:.2f} GiB",
            f"left {left}",
        ]
        if metrics["data/skipped_total"]:
            parts.append(f"skipped {metrics['data/skipped_total']:.0f}")
        print("  ".join(parts), flush=True)


class JsonLines:
    """metrics.jsonl: the truth about a run. A resumed run drops what it will do again."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self._path = folder / METRICS
        kept = [m for m in read_metrics(folder) if m["step"] <= first_step]
        temporary = self._path.with_name(METRICS + ".new")
        temporary.write_text("".join(json.dumps(m) + "\n" for m in kept))
        temporary.replace(self._path)

    def log(self, metrics: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(metrics) + "\n")


class Wandb:
    """W&B on request, never fatal: a failure is said once and training goes on."""

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

    def _give_up(self, error: Exception) -> None:
        self._run = None
        print(f"W&B is off for this run ({error}); metrics.jsonl goes on.", flush=True)


def quarantine(folder: Path, rank: int, skipped: list[Skipped]) -> None:
    """Append the videos that did not decode; ranks write whole lines to one file."""
    if skipped:
        lines = [
            json.dumps({"key": s.key, "kind": s.kind, "message": s.message, "rank": rank}) + "\n"
            for s in skipped
        ]
        with (folder / QUARANTINE).open("a") as file:
            file.write("".join(lines))
