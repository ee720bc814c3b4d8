"""Training a detector of actions in boxes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arvideo_ds.config import DetectRecipe
from arvideo_ds.errors import UserError
from arvideo_ds.planning.plan import RunPlan
from arvideo_ds.shards.manifest import ShardSet
from arvideo_ds.shards.mix import AnyShards
from arvideo_ds.tasks.transfer import Transfer

_BOX_FILES = ("annotations", "detections", "excluded", "action_list")


class Detection(Transfer):
    recipe: DetectRecipe
    recorded = ("map", "map_uncapped")

    def __init__(self, recipe: DetectRecipe) -> None:
        super().__init__(recipe)
        self.best_by = recipe.evaluation.best_by

    def check(self, plan: RunPlan, shards: AnyShards | None, validation: ShardSet | None) -> None:  # noqa: ARG002
        """Errors: `UserError` where files of boxes are missing."""
        self.require_validation(validation)
        for section, files, opened in (
            ("detect", self.recipe.detect, shards),
            ("evaluation", self.recipe.evaluation, validation),
        ):
            if opened is not None and files.annotations is None:
                raise UserError(
                    f"{section}.annotations is not given: the file of boxes that {opened.name} was "
                    "made from, such as ava_train_v2.2.csv."
                )
            for key, value in files:
                if key in _BOX_FILES and value is not None and not Path(value).is_file():
                    raise UserError(f"{section}.{key}={value}: there is no such file.")

    def metric_words(self, metrics: Mapping[str, Any]) -> str:
        return f"validation mAP {metrics['map']:.2f} % (all rows: {metrics['map_uncapped']:.2f} %)"

    def build(self, shards: AnyShards) -> Any:  # noqa: ARG002
        from arvideo_ds.tasks.detect import Detect

        return Detect(self.recipe)

    def clips(self) -> dict[str, Any]:
        from arvideo_ds.data.detection import TrainKeyframes, collate_keyframes

        return {"clips": TrainKeyframes, "together": collate_keyframes}

    def validation(self, shards: ShardSet) -> Any:
        """Frame mAP on every keyframe, with ActivityNet's cap and without."""
        from arvideo_ds.evaluation.detection import DetectionEvaluator

        evaluator = DetectionEvaluator(shards, self.recipe)

        def measure(predict: Any, **options: Any) -> dict[str, float]:
            report = evaluator.report(evaluator.detect(predict, **options))
            counts = {name: getattr(report, name) for name in ("keyframes", "boxes", "unreadable")}
            return {name: 100 * mean for name, mean in report.means().items()} | counts

        return measure
