"""The measures of a grid's cells: probes after pretraining, a test after fine-tuning."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from arvideo_ds.config import Recipe
from arvideo_ds.errors import UserError
from arvideo_ds.evaluation.probes import DEFAULT_PROBES, PROBES, open_probe_shards
from arvideo_ds.long_video.score_store import hash_of_scores
from arvideo_ds.shards.manifest import ShardSet, by_set, require_same_labels
from arvideo_ds.tasks.teacher import teacher_facts

if TYPE_CHECKING:
    from arvideo_ds.ablation.cell import Cell


class Probing:
    """Probes of the frozen encoder.

    legend: describes the accuracies. untrained: whether the untrained encoder is a row. shards: the
    settings that --train and --test set.
    """

    legend = "Accuracies of the frozen encoder"
    untrained = True
    shards: ClassVar[dict[str, tuple[str, ...]]] = {
        "train": ("data.shards", "probe.train_shards"),
        "test": ("probe.test_shards",),
    }

    def measures(self, _recipe: Any) -> dict[str, str]:
        """Key of a measure in a cell's result -> its name in tables."""
        return {_key(name): PROBES[name].label for name in DEFAULT_PROBES}

    def data(
        self, recipe: Any, probe_videos: tuple[int, int] | None
    ) -> tuple[dict[str, Any], float]:
        """Identifies the data that decide a result, and gives the accuracy of guessing in percent.

        Errors: `UserError` where shards are missing or have different labels.
        """
        train, test = open_probe_shards(recipe.probe)
        data = {
            "manifest": _open(recipe.data.shards, "data.shards", "--train").hash,
            "probe_manifests": [train.hash, test.hash],
            "probe_videos": list(probe_videos or (train.num_samples, test.num_samples)),
            "probe_features": recipe.probe.features,
        }
        return data, 100 / len(train.manifest.labels or "?")

    def sources(self, recipe: Any) -> dict[str, str | None]:
        """Identifies the token scores or weights that a run needs. Errors: `UserError`."""
        return {"scores": hash_of_scores(recipe), **_teacher(recipe)}

    def result(self, cell: Cell, recipe: Any) -> dict[str, Any]:
        """The measures in percent, and the number of skipped videos; on one rank."""
        from arvideo_ds.evaluation.features import freeze
        from arvideo_ds.evaluation.pretrained import load_trained_encoder, untrained

        encoder = (
            load_trained_encoder(recipe, cell.folder) if cell.trained else untrained(recipe).encoder
        )
        shards = open_probe_shards(recipe.probe)
        frozen = freeze(encoder, recipe, *shards, videos=cell.probe_videos)
        accuracies = {_key(name): PROBES[name]().accuracy(frozen) for name in DEFAULT_PROBES}
        measured = {key: round(100 * accuracy, 2) for key, accuracy in accuracies.items()}
        return {**measured, "skipped": sum(features.skipped for features in frozen.features)}


class Testing:
    """A test of the last weights, which no test video selects; attributes as `Probing`."""

    legend = "Top-1 of the last weights on the test videos"
    untrained = False
    shards: ClassVar[dict[str, tuple[str, ...]]] = {
        "train": ("data.shards",),
        "test": ("evaluation.shards",),
    }

    def measures(self, recipe: Any) -> dict[str, str]:
        heads = {f"{name}_top1": f"{name} top-1" for name in recipe.heads or ()}
        return {"top1": "top-1", **heads}

    def data(self, recipe: Any, _probe_videos: object) -> tuple[dict[str, Any], float]:
        train = _open(recipe.data.shards, "data.shards", "--train")
        test = _open(recipe.evaluation.shards, "evaluation.shards", "--test")
        names = [shards.manifest.class_names(recipe.heads) for shards in (train, test)]
        require_same_labels(train.name, names[0], test.name, names[1])
        views = list(recipe.evaluation.views)
        data = {"manifest": train.hash, "test_manifest": test.hash, "views": views}
        return data, 100 / math.prod(len(classes) or 1 for classes in by_set(names[0]).values())

    def sources(self, recipe: Any) -> dict[str, str | None]:
        return {"init_from": recipe.finetune.init_from, **_teacher(recipe)}

    def result(self, cell: Cell, recipe: Any) -> dict[str, Any]:
        from arvideo_ds.train.evaluate import evaluate

        evaluation = recipe.evaluation
        tested = evaluate(
            cell.folder, recipe, evaluation.shards, views=evaluation.views, name="last", alone=True
        )
        measured = {"top1": round(tested["top1"], 2), "skipped": tested["unreadable"]}
        for name, one in tested.get("label_sets", {}).items():
            measured[f"{name}_top1"] = round(one["top1"], 2)
        return measured


Judge = Probing | Testing
_JUDGES: dict[str, Judge] = {"pretrain": Probing(), "finetune": Testing()}


def judge_of(recipe: Recipe) -> Judge:
    """Errors: `UserError` for a task without measures."""
    if recipe.task not in _JUDGES:
        raise UserError(f"task={recipe.task}: grids compare runs of {' and '.join(_JUDGES)}.")
    return _JUDGES[recipe.task]


def _teacher(recipe: Recipe) -> dict[str, str]:
    return {name: facts["sha256"] for name, facts in teacher_facts(recipe).items()}


def _key(probe: str) -> str:
    return probe.removesuffix("_probe")


def _open(where: str | None, key: str, option: str) -> ShardSet:
    if where is None:
        raise UserError(f"the grid's recipe has no {key}; give {option} SHARDS.")
    return ShardSet(where)
