"""How good the model is by now: measured while training; the best weights so far are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from arvideo_ds.data.loader import worker_count
from arvideo_ds.engine.build import Engine
from arvideo_ds.engine.checkpoints import export_weights, newest_checkpoint
from arvideo_ds.engine.world import World
from arvideo_ds.files.atomic import write_json
from arvideo_ds.planning.plan import RunPlan
from arvideo_ds.runs import run_folder
from arvideo_ds.shards.manifest import ShardSet
from arvideo_ds.tasks import PREFIX, Task

BEST = "best.json"


class Validation:
    """The task's validation, as often as the recipe says; `best` are step and metrics so far."""

    def __init__(
        self,
        engine: Engine,
        task: Task,
        plan: RunPlan,
        shards: ShardSet,
        world: World,
        folder: Path,
        first_step: int,
    ) -> None:
        self._engine, self._task, self._world = engine, task, world
        self._measure = task.validation(shards)
        self._steps = plan.steps
        steps_per_epoch = plan.num_videos / plan.videos_per_step
        self._every = max(1, round(task.every_epochs * steps_per_epoch))
        self._folder = folder
        self.best = _best_until(folder / BEST, first_step)

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
        """Export the checkpoint of `done`, the newest one, if its weights are the best so far.

        One rank does it. metrics: of that step; without a validation nothing happens.
        """
        best_by = self._task.best_by
        value = metrics.get(f"validation/{best_by}")
        if best_by is None or value is None or (self.best and value <= self.best[best_by]):
            return
        checkpoint = newest_checkpoint(self._folder / run_folder.CHECKPOINTS)
        assert checkpoint is not None and checkpoint.step == done, "saved before it is kept"
        weights = self._folder / run_folder.BEST_MODEL
        export_weights(checkpoint.path, weights, prefix=PREFIX)
        recorded = {name: metrics.get(f"validation/{name}") for name in self._task.recorded}
        self.best = {"step": done, **recorded, best_by: value}
        write_json(self._folder / BEST, self.best)
        run_folder.update_summary(self._folder, {"best": self.best})


def _best_until(path: Path, first_step: int) -> dict[str, Any]:
    """The best of an earlier start, unless it is after the step where this one begins."""
    best = json.loads(path.read_text()) if path.is_file() else {}
    return best if best.get("step", first_step + 1) <= first_step else {}
