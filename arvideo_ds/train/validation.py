"""How good the model is by now: scored while training; the best weights so far are kept."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from arvideo_ds.config import DetectRecipe
from arvideo_ds.data.loader import worker_count
from arvideo_ds.engine.build import Engine
from arvideo_ds.engine.checkpoints import newest_checkpoint
from arvideo_ds.engine.export import export_weights
from arvideo_ds.engine.world import World
from arvideo_ds.evaluation.detection import Judge
from arvideo_ds.evaluation.features import FrozenEncoder
from arvideo_ds.evaluation.probes import PROBES
from arvideo_ds.evaluation.scores import JointScores, score_videos
from arvideo_ds.files.atomic import write_json
from arvideo_ds.long_video.quality import judge
from arvideo_ds.planning.plan import RunPlan
from arvideo_ds.runs import run_folder
from arvideo_ds.shards.manifest import ShardSet
from arvideo_ds.tasks import PREFIX

BEST = "best.json"


class Validation:
    """Top-1 and top-5 on the central clip of every video of `evaluation.shards`.

    Where the recipe has heads, of all labels together; beside them top-1 of each.
    """

    # The metric whose highest value is the best, and others that are noted with it.
    best_by = "top1"
    noted: tuple[str, ...] = ()

    def __init__(
        self,
        engine: Engine,
        recipe: Any,
        plan: RunPlan,
        shards: ShardSet,
        world: World,
        folder: Path,
        first_step: int,
    ) -> None:
        self._engine, self._recipe, self._shards, self._world = engine, recipe, shards, world
        self._steps = plan.steps
        steps_per_epoch = plan.num_videos / plan.videos_per_step
        self._every = max(1, round(self._every_epochs(recipe) * steps_per_epoch))
        self._folder = folder
        self.best = _best_until(folder / BEST, first_step)

    @staticmethod
    def _every_epochs(recipe: Any) -> float:
        return float(recipe.evaluation.every_epochs)

    def due(self, done: int) -> bool:
        return done % self._every == 0 or done == self._steps

    def run(self) -> dict[str, float]:
        """Metrics of the weights as they are now. Collective."""
        scores = score_videos(
            self._engine.evaluate,
            self._shards,
            self._recipe,
            views=(1, 1),
            batch=self._recipe.evaluation.batch,
            num_workers=worker_count(self._recipe, cores=self._world.cores),
            device=self._world.device,
        )
        sets = scores.sets if isinstance(scores, JointScores) else {}
        return {
            **{f"validation/top1_{name}": 100 * own.accuracy() for name, own in sets.items()},
            "validation/top1": 100 * scores.accuracy(),
            "validation/top5": 100 * scores.accuracy(5),
            "validation/loss": scores.loss(),
            "validation/videos": len(scores.labels),
            "validation/unreadable": len(scores.skipped),
        }

    def keep_best(self, done: int, metrics: dict[str, Any]) -> None:
        """Export the checkpoint of `done`, the newest one, if its weights are the best so far.

        One rank does it. metrics: of that step; without a validation nothing happens.
        """
        value = metrics.get(f"validation/{self.best_by}")
        if value is None or (self.best and value <= self.best[self.best_by]):
            return
        checkpoint = newest_checkpoint(self._folder / run_folder.CHECKPOINTS)
        assert checkpoint is not None and checkpoint.step == done, "saved before it is kept"
        weights = self._folder / run_folder.BEST_MODEL
        export_weights(checkpoint.path, weights, prefix=PREFIX)
        noted = {name: metrics.get(f"validation/{name}") for name in self.noted}
        self.best = {"step": done, **noted, self.best_by: value}
        write_json(self._folder / BEST, self.best)
        run_folder.update_summary(self._folder, {"best": self.best})


class DetectionValidation(Validation):
    """Frame mAP on every keyframe of `evaluation.shards`, with ActivityNet's cap and without.

    `evaluation.best_by` says which of the two chooses the best weights.
    """

    noted = ("map", "map_uncapped")

    def __init__(self, engine: Engine, recipe: DetectRecipe, *others: Any) -> None:
        super().__init__(engine, recipe, *others)
        self.best_by = recipe.evaluation.best_by
        self._judge = Judge(self._shards, recipe)

    def run(self) -> dict[str, float]:
        found = self._judge.find(
            self._engine.evaluate,
            num_workers=worker_count(self._recipe, cores=self._world.cores),
            device=self._world.device,
        )
        report = self._judge.report(found)
        return {
            **{f"validation/{name}": 100 * mean for name, mean in report.means().items()},
            "validation/keyframes": report.keyframes,
            "validation/boxes": report.boxes,
            "validation/unreadable": report.unreadable,
        }


class TokenizerValidation(Validation):
    """What the reconstructions of `evaluation.shards` lost, and how many codes are in use."""

    best_by = "psnr_db"

    def run(self) -> dict[str, float]:
        quality = judge(
            self._engine.evaluate,
            self._shards,
            self._recipe,
            num_workers=worker_count(self._recipe, cores=self._world.cores),
            device=self._world.device,
        )
        return {f"validation/{name}": value for name, value in asdict(quality).items()}


class OnlineProbe(Validation):
    """Nearest-neighbour accuracy of the encoder as it is now, on the recipe's probe shards.

    No weights are chosen by it: pretraining has seen no labels, and shall not.
    """

    best_by = "none"

    @staticmethod
    def _every_epochs(recipe: Any) -> float:
        return float(recipe.probe.every_epochs)

    def run(self) -> dict[str, float]:
        recipe = self._recipe
        frozen = FrozenEncoder(
            self._engine.evaluate,
            recipe,
            ShardSet(recipe.probe.train_shards),
            self._shards,
            self._world.device,
            num_workers=worker_count(recipe, cores=self._world.cores),
            batch=recipe.train.micro_batch,
            progress=False,
        )
        return {
            "validation/knn": 100 * PROBES["knn"]().accuracy(frozen),
            "validation/unreadable": sum(features.skipped for features in frozen.features),
        }


def _best_until(path: Path, first_step: int) -> dict[str, Any]:
    """What an earlier start found best, unless it lies ahead of where this one begins."""
    best = json.loads(path.read_text()) if path.is_file() else {}
    return best if best.get("step", first_step + 1) <= first_step else {}
