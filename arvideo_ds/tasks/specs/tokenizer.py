"""Training the adaptive tokenizer of long video."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from arvideo_ds.config import TokenizerRecipe
from arvideo_ds.errors import UserError
from arvideo_ds.planning.plan import RunPlan
from arvideo_ds.shards.manifest import ShardSet
from arvideo_ds.shards.mix import AnyShards
from arvideo_ds.tasks.task import Task


class TokenizerTraining(Task):
    recipe: TokenizerRecipe
    best_by = "psnr_db"

    def check(self, plan: RunPlan, shards: AnyShards | None, validation: ShardSet | None) -> None:  # noqa: ARG002
        """Errors: `UserError` where shards or the weights of the perceptual loss are missing."""
        if shards is None:
            return
        self.require_validation(validation)
        network = self.recipe.tokenizer.perceptual_network
        if network is not None and not Path(network).is_file():
            raise UserError(f"tokenizer.perceptual_network={network}: there is no such file.")

    def model_words(self) -> str:
        return f"tokenizer, {self.recipe.tokenizer.filters} filters"

    def token_words(self, plan: RunPlan) -> str:  # noqa: ARG002
        settings = self.recipe.tokenizer
        return f"; {settings.kept(self.recipe.geometry)} kept, {settings.num_codes} codes"

    def metric_words(self, metrics: Mapping[str, Any]) -> str:
        return (
            f"PSNR {metrics['psnr_db']:.2f} dB, SSIM {metrics['ssim']:.3f}, codes used "
            f"{100 * metrics['code_usage']:.1f} %"
        )

    def build(self, shards: AnyShards) -> Any:  # noqa: ARG002
        from arvideo_ds.long_video.training import TrainTokenizer

        return TrainTokenizer(self.recipe)

    def validation(self, shards: ShardSet) -> Any:
        """Quality of the reconstructions, and the share of codes in use."""
        from arvideo_ds.long_video.quality import judge

        return lambda predict, **options: asdict(judge(predict, shards, self.recipe, **options))
