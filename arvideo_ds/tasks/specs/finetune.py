"""Fine-tuning a classifier on labels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arvideo_ds.config import FinetuneRecipe
from arvideo_ds.errors import UserError
from arvideo_ds.planning.plan import RunPlan
from arvideo_ds.shards.manifest import ClassNames, ShardSet, by_set, require_same_labels
from arvideo_ds.shards.mix import AnyShards
from arvideo_ds.tasks.teacher import settle_teacher
from arvideo_ds.tasks.transfer import Transfer, settle_transfer


class Finetuning(Transfer):
    recipe: FinetuneRecipe
    best_by = "top1"

    def __init__(self, recipe: FinetuneRecipe) -> None:
        super().__init__(recipe)
        if recipe.finetune.head_grid:
            self.recorded = ("head", *map(_top1_of, recipe.finetune.head_grid))

    def settled(self, folder: Path) -> FinetuneRecipe:
        return settle_teacher(settle_transfer(self.recipe, folder))

    def check(self, plan: RunPlan, shards: AnyShards | None, validation: ShardSet | None) -> None:
        """Errors: `UserError` where the classes of recipe, shards and validation differ."""
        settings = self.recipe.finetune
        if plan.micro_batch % 2 and settings.mixes:
            raise UserError(
                f"finetune.mixup and finetune.cutmix mix the clips of a micro-batch in pairs, but "
                f"it has {plan.micro_batch}. Choose train.total_batch and train.micro_batch so "
                "that it is even, or set both to 0."
            )
        if plan.sequence_parallel > 1 and (settings.train == "head" or settings.lora_dropout):
            key = "lora_dropout" if settings.lora_dropout else "train"
            raise UserError(
                f"finetune.{key}={getattr(settings, key)} does not go with sequence_parallel_size="
                f"{plan.sequence_parallel} in the DeepSpeed JSON: ranks would "
                + ("encode all tokens each." if key == "train" else "drop the same values.")
                + " Use another JSON."
            )
        if shards is None:
            return
        if settings.head_grid and self.recipe.evaluation.shards is None:
            raise UserError(
                "finetune.head_lrs trains several heads, and evaluation.shards choose the exported "
                "one: set evaluation.shards, to other videos than those of the reported result."
            )
        labels = self.labels(shards)
        if labels is None:
            raise UserError(
                f"{shards.name} has no labels; fine-tuning needs shards made from class folders, a "
                "CSV with a label column or a labelled data set (docs/datasets.md)."
            )
        if settings.num_classes not in (None, len(labels)):
            raise UserError(
                f"finetune.num_classes={settings.num_classes}, but {shards.name} has {len(labels)} "
                "classes. Remove the key, or set data.shards to the shards with these classes."
            )
        self.require_validation(validation)
        if validation is not None:
            require_same_labels(shards.name, labels, validation.name, self.labels(validation))
        if settings.teacher is not None:
            self._check_teacher(settings.teacher, shards)

    def _check_teacher(self, teacher: str, shards: AnyShards) -> None:
        """Errors: `UserError` where its classes have other names than those of the shards."""
        names = self._names_of(Path(teacher))
        if names is None:
            return
        labels, where = self.labels(shards), f"finetune.teacher={teacher}"
        require_same_labels(shards.name, labels, where, names)
        if list(by_set(labels)) != list(by_set(names)):
            raise UserError(
                f"{where} scores the label sets {list(by_set(names))} in this order; set "
                f"finetune.heads to it in place of {list(by_set(labels))}."
            )

    def model_words(self) -> str:
        settings, words = self.recipe.finetune, super().model_words()
        if settings.teacher is not None:
            return f"{words}, scores of ViT-{settings.teacher_size} {settings.teacher}"
        grid = settings.head_grid
        if not grid:
            return words
        rates, decays = self.recipe.finetune.head_lrs, self.recipe.finetune.head_weight_decays
        return (
            f"{words}, frozen; {len(grid)} heads ({len(rates)} learning rates x {len(decays)} "
            "weight decays) on its tokens, encoded anew in each step, once for all heads"
        )

    def metric_words(self, metrics: Mapping[str, Any]) -> str:
        words, grid = f"validation top-1 {metrics['top1']:.2f} %", self.recipe.finetune.head_grid
        if not grid:
            return words
        worst = min(metrics[_top1_of(head)] for head in grid)
        return f"{words} of the best head (worst {worst:.2f} %; {_named(grid[metrics['head']])})"

    def build(self, shards: AnyShards) -> Any:
        from arvideo_ds.tasks.finetune import Finetune

        return Finetune(self.recipe, *map(len, by_set(self.labels(shards)).values()))

    def freeze(self, module: Any) -> None:
        from arvideo_ds.models.adapters import freeze_encoder

        freeze_encoder(module.model, self.recipe.finetune)
        module.train()

    def parameter_groups(self, module: Any) -> list[dict[str, Any]] | None:
        grid = self.recipe.finetune.head_grid
        if not grid:
            return None
        return [
            {
                "name": _named(head),
                "params": list(part.parameters()),
                "weight_decay": head[1],
                "lr_scale": head[0] / self.recipe.optim.base_lr,
            }
            for head, part in zip(grid, module.model.heads, strict=True)
        ]

    def exported(self, state: Any, metrics: Mapping[str, Any]) -> Any:
        from arvideo_ds.models.adapters import merge_adapters
        from arvideo_ds.models.classifier import only_head

        if self.recipe.finetune.head_grid:
            state = only_head(state, int(metrics["validation/head"]))
        return merge_adapters(state, self.recipe.finetune)

    def same_classes(self, source: Path, shards: AnyShards) -> bool | None:
        names = self._names_of(source)
        if names is None:
            return None
        # As lists: the logits of label sets are in their order.
        return list(by_set(names).items()) == list(by_set(self.labels(shards)).items())

    @staticmethod
    def _names_of(source: Path) -> ClassNames | None:
        """Class names beside a model's weights, where there are any."""
        from arvideo_ds.evaluation.pretrained import read_labels

        return read_labels(source if source.is_dir() else source.parent)

    def labels(self, shards: AnyShards) -> ClassNames | None:
        return shards.manifest.class_names(self.recipe.heads)

    def validation(self, shards: ShardSet) -> Any:
        """Top-1 and top-5 on the central clip of every video.

        With data.segments, on as many clips as in training. Where the recipe has heads, of all
        labels together, and top-1 of each head. With several heads of one label, top-1 of each, and
        all of the first one with the highest top-1, whose number is `head`.
        """
        from arvideo_ds.evaluation.scores import JointScores, score_heads, score_videos

        recipe, grid = self.recipe, self.recipe.finetune.head_grid
        common = {"views": recipe.training_views, "batch": recipe.evaluation.batch}

        def measure_heads(predict: Any, **options: Any) -> dict[str, float]:
            scores = score_heads(predict, shards, recipe, len(grid), **common, **options)
            best = max(range(len(grid)), key=lambda head: scores["top1"][head])
            return {
                **{
                    _top1_of(head): 100 * top1
                    for head, top1 in zip(grid, scores["top1"], strict=True)
                },
                "head": best,
                "top1": 100 * scores["top1"][best],
                "top5": 100 * scores["top5"][best],
                "loss": scores["loss"][best],
                "videos": scores["videos"],
                "unreadable": scores["unreadable"],
            }

        def measure(predict: Any, **options: Any) -> dict[str, float]:
            scores = score_videos(predict, shards, recipe, **common, **options)
            sets = scores.sets if isinstance(scores, JointScores) else {}
            return {
                **{f"top1_{name}": 100 * of_set.accuracy() for name, of_set in sets.items()},
                "top1": 100 * scores.accuracy(),
                "top5": 100 * scores.accuracy(5),
                "loss": scores.loss(),
                "videos": len(scores.labels),
                "unreadable": len(scores.skipped),
            }

        return measure_heads if grid else measure


def _named(head: tuple[float, float]) -> str:
    """Learning rate and weight decay of a head."""
    return "lr {:g}, decay {:g}".format(*head)


def _top1_of(head: tuple[float, float]) -> str:
    """The metric of a head's top-1."""
    return "top1_lr{:g}_decay{:g}".format(*head)
