"""Pretraining with any objective, validated by a probe of the frozen encoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arvideo_ds.config import PretrainRecipe
from arvideo_ds.config.objectives import LvmaeSettings
from arvideo_ds.errors import UserError
from arvideo_ds.evaluation.probes import POOLINGS, require_probe_labels
from arvideo_ds.long_video.score_store import TokenScores
from arvideo_ds.planning.plan import RunPlan
from arvideo_ds.shards.manifest import ShardSet
from arvideo_ds.shards.mix import AnyShards
from arvideo_ds.tasks.task import open_shards
from arvideo_ds.tasks.teacher import settle_teacher
from arvideo_ds.tasks.transfer import StartTask, origin_of, settle_transfer


class Pretraining(StartTask):
    """The probe chooses no weights: labels must not influence pretraining."""

    recipe: PretrainRecipe

    def settled(self, folder: Path) -> PretrainRecipe:
        return settle_teacher(settle_transfer(self.recipe, folder))

    def evaluation_shards(self) -> list[str | None]:
        probe = self.recipe.probe
        return [] if probe.every_epochs is None else [probe.train_shards, probe.test_shards]

    @property
    def every_epochs(self) -> float:
        return float(self.recipe.probe.every_epochs or 0)

    def open_validation(self) -> ShardSet | None:
        """The test shards of the online probe. Errors: `UserError` for missing or unfit shards."""
        probe = self.recipe.probe
        POOLINGS.check(probe.features, key="probe.features")
        if probe.every_epochs is None:
            return None
        train, test = open_shards(probe.train_shards), open_shards(probe.test_shards)
        if train is None or test is None:
            if all(map(self.will_be_made, (probe.train_shards, probe.test_shards))):
                return None
            raise UserError(
                f"probe.every_epochs={probe.every_epochs:g} needs labelled shards in "
                f"probe.train_shards ({probe.train_shards}) and probe.test_shards "
                f"({probe.test_shards}). Make them, or remove probe.every_epochs."
            )
        require_probe_labels(train, test)
        return test

    def check(self, plan: RunPlan, shards: AnyShards | None, validation: ShardSet | None) -> None:  # noqa: ARG002
        """Errors: `UserError` where data.scores does not fit the objective."""
        objective, where = self.recipe.objective, self.recipe.data.scores
        if shards is None:
            return
        if where is None and self.recipe.needs_scores:
            raise UserError(
                f"objective.name={objective.name} as the recipe sets it needs scores of the "
                f"tokens. Make them: arvideo score_tokens --shards {shards.name} "
                "--scorer tokenizer --tokenizer RUN --recipe RECIPE; then add data.crop=grid "
                f"data.scores={shards.name}/scores/tokenizer."
            )
        if where is None or not isinstance(objective, LvmaeSettings):
            return
        if objective.targets != "latents":
            return
        scores = TokenScores(where)
        if scores.spec.levels is None:
            raise UserError(
                f"objective.targets=latents needs a tokenizer's codes, but {scores.name} was made "
                f"by the scorer {scores.spec.scorer}, which has none. Score with --scorer "
                "tokenizer, or set objective.targets: pixels."
            )
        if scores.spec.levels != objective.latent_levels:
            raise UserError(
                f"objective.latent_levels={list(objective.latent_levels)}, but the tokenizer of "
                f"{scores.name} has {list(scores.spec.levels)}. Set objective.latent_levels to it."
            )

    def model_words(self) -> str:
        objective = self.recipe.objective
        words = f"{objective.name}, ViT-{self.recipe.model.size}"
        if objective.teacher is None:
            return words
        return f"{words}, features of ViT-{objective.teacher_size} {objective.teacher}"

    def token_words(self, plan: RunPlan) -> str:
        positions = self.position_words()
        clusters = f" -> {plan.num_clusters} clusters of {plan.cluster_size}"
        dropped = "" if plan.dropped_share is None else f" ({plan.dropped_share:.1%} dropped)"
        tokens = f"{plan.encoder_tokens} tokens encoded{dropped}, {plan.decoder_queries} predicted"
        words = f"{clusters}; {tokens}" if plan.num_clusters > 1 else f"; {tokens}"
        return words + positions

    def metric_words(self, metrics: Mapping[str, Any]) -> str:
        return f"nearest neighbours {metrics['knn']:.2f} %"

    def build(self, shards: AnyShards) -> Any:  # noqa: ARG002
        from arvideo_ds.tasks.pretrain import Pretrain

        return Pretrain(self.recipe)

    def load(self, model: Any, source: Path, shards: AnyShards) -> Any:  # noqa: ARG002
        from arvideo_ds.models.layouts import load_objective_weights

        recipe = origin_of(source)[1]
        same = recipe is not None and recipe.decoding == self.recipe.decoding
        return load_objective_weights(model, source, patch=self.recipe.patch, same_decoder=same)

    def validation(self, shards: ShardSet) -> Any:
        from arvideo_ds.evaluation.features import FrozenEncoder
        from arvideo_ds.evaluation.probes import PROBES

        recipe = self.recipe
        assert recipe.probe.train_shards is not None
        train = ShardSet(recipe.probe.train_shards)

        def measure(predict: Any, **options: Any) -> dict[str, float]:
            """Nearest-neighbour accuracy of the current encoder."""
            batch = recipe.train.micro_batch
            frozen = FrozenEncoder(
                predict, recipe, train, shards, batch=batch, progress=False, **options
            )
            return {
                "knn": 100 * PROBES["knn"]().accuracy(frozen),
                "unreadable": sum(features.skipped for features in frozen.features),
            }

        return measure
