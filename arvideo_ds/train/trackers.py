"""Logs of a run's metrics for other programs: W&B, TensorBoard, Trackio."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from arvideo_ds.config.schema import WandbSettings
from arvideo_ds.runs.run_folder import read_metrics


class Tracker:
    """Its first failure is printed and ends the log, not the run."""

    name: str

    def __init__(self) -> None:
        # The log of the tracker's package; None before the start and after a failure.
        self._run: Any = None

    def log(self, metrics: dict[str, Any]) -> None:
        if self._run is not None:
            with self._off_after_failure():
                self._write(metrics)

    def close(self) -> None:
        """Send what is still queued."""
        if self._run is not None:
            with self._off_after_failure():
                self._finish()

    def _write(self, metrics: dict[str, Any]) -> None:
        self._run.log(metrics)

    def _finish(self) -> None:
        self._run.finish()

    @contextlib.contextmanager
    def _off_after_failure(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever its network, login or disk raises
            self._run = None
            print(f"{self.name} is off for this run ({error}); metrics.jsonl goes on.", flush=True)


class Wandb(Tracker):
    """settings: settled."""

    name = "W&B"

    def __init__(self, folder: Path, settings: WandbSettings, config: dict[str, Any]) -> None:
        super().__init__()
        with self._off_after_failure():
            import wandb

            self._run = wandb.init(
                id=_id_of_run(folder / "wandb_id"),
                resume="allow",
                **settings.model_dump(include={"mode", "project", "entity", "group"}),
                tags=list(settings.tags) or None,
                name=folder.name,
                dir=str(folder),
                config=config,
                settings={"quiet": True},  # no table of all metrics after the run
            )
            self._run.define_metric("*", step_metric="step")


class TensorBoard(Tracker):
    """Event files in the run's folder; steps that a resumed run repeats are hidden."""

    name = "TensorBoard"

    def __init__(self, folder: Path, first_step: int) -> None:
        super().__init__()
        with self._off_after_failure():
            from torch.utils.tensorboard import SummaryWriter

            self._run = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def _write(self, metrics: dict[str, Any]) -> None:
        for name, value in _numbers(metrics).items():
            self._run.add_scalar(name, value, metrics["step"])
        self._run.flush()  # a crash loses no step

    def _finish(self) -> None:
        self._run.close()


class Trackio(Tracker):
    """A run of a Trackio project, rewritten from metrics.jsonl at each start.

    Trackio writes with a delay and forgets no step, so after a crash its log may lack steps, and
    have those that the run will repeat.
    """

    name = "Trackio"

    def __init__(self, folder: Path, project: str, config: dict[str, Any]) -> None:
        super().__init__()
        with self._off_after_failure():
            import trackio

            name = f"{folder.name}-{_id_of_run(folder / 'trackio_id')}"
            with contextlib.suppress(ValueError):  # no such project yet
                for run in trackio.Api().runs(project):
                    if run.name == name:
                        run.delete()
            self._run = trackio.init(
                project, name, config=config, embed=False, auto_log_gpu=False, auto_log_cpu=False
            )
            for metrics in read_metrics(folder):
                self._write(metrics)

    def _write(self, metrics: dict[str, Any]) -> None:
        self._run.log(_numbers(metrics), step=metrics["step"])


def _id_of_run(file: Path) -> str:
    """A random id that stays with the run, so that a requeued job continues the same curve."""
    if not file.is_file():
        file.write_text(secrets.token_hex(4))
    return file.read_text()


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {k: v for k, v in metrics.items() if isinstance(v, int | float) and k != "step"}
