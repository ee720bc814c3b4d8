"""Validation during training; the best weights so far are kept."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from arvideo_ds.data.loader import worker_count
from arvideo_ds.engine.build import Engine
from arvideo_ds.engine.checkpoints import export_weights, newest_checkpoint
from arvideo_ds.engine.world import World
from arvideo_ds.files.atomic import write_json
from arvideo_ds.runs import run_folder
from arvideo_ds.tasks import PREFIX
from arvideo_ds.train.settle import RunSettings

BEST = "best.json"


class Validation:
    """The task's validation. `best`: step and metrics of the best weights so far."""

    def __init__(
        self, engine: Engine, settings: RunSettings[Any], world: World, first_step: int
    ) -> None:
        self._engine, self._world, self._folder = engine, world, settings.folder
        self._task, plan = settings.task, settings.plan
        assert settings.validation is not None
        self._measure = self._task.validation(settings.validation)
        self._steps = plan.steps
        steps_per_epoch = plan.num_videos / (plan.videos_before(plan.steps) / plan.steps)
        self._every = max(1, round(self._task.every_epochs * steps_per_epoch))
        path = self._folder / BEST
        best = json.loads(path.read_text()) if path.is_file() else {}
        # An earlier start may have found it after the step that this one resumes from.
        self.best = best if best.get("step", first_step + 1) <= first_step else {}
        if world.is_main:
            # An earlier start may have been killed between its last save and the export.
            last = {m["step"]: m for m in run_folder.read_metrics(self._folder)}
            self.keep_best(first_step, last.get(first_step, {}))

    def due(self, done: int) -> bool:
        return done % self._every == 0 or done == self._steps

    def run(self) -> dict[str, float]:
        """Metrics of the weights as they are now. Collective."""
        metrics = self._measure(
            self._engine.evaluate,
            num_workers=worker_count(self._task.recipe, cores=self._world.cores),
            device=self._world.device,
        )
        return {f"validation/{name}": value for name, value in metrics.items()}

    def keep_best(self, done: int, metrics: dict[str, Any]) -> None:
        """Export the newest checkpoint, of step `done`, if its metrics are the best. One rank."""
        best_by = self._task.best_by
        value = metrics.get(f"validation/{best_by}")
        if best_by is None or value is None or (self.best and value <= self.best[best_by]):
            return
        checkpoint = newest_checkpoint(self._folder / run_folder.CHECKPOINTS)
        assert checkpoint is not None and checkpoint.step == done, "saved before it is exported"
        path = self._folder / run_folder.BEST_MODEL
        change = partial(self._task.exported, metrics=metrics)
        export_weights(checkpoint.path, path, prefix=PREFIX, change=change)
        recorded = {name: metrics.get(f"validation/{name}") for name in self._task.recorded}
        self.best = {"step": done, **recorded, best_by: value}
        write_json(self._folder / BEST, self.best)
        run_folder.update_summary(self._folder, {"best": self.best})
