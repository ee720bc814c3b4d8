"""The base of tasks that may start from other weights; importing it needs no torch.

Weights do not show their table of positions nor its token grid. A run's recipe has both, and a
`config.json` of transformers the clip.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from pathlib import Path
from typing import Any, TypeVar

from arvideo_ds.config import EncoderRecipe, StartRecipe, TransferRecipe
from arvideo_ds.errors import UserError
from arvideo_ds.geometry import Triple
from arvideo_ds.planning.plan import RunPlan
from arvideo_ds.runs import run_folder
from arvideo_ds.shards.mix import AnyShards
from arvideo_ds.tasks.task import Task

AnyStart = TypeVar("AnyStart", bound=StartRecipe)


class StartTask(Task):
    """A task whose recipe has a section of `StartSettings`."""

    recipe: StartRecipe

    def settled(self, folder: Path) -> StartRecipe:
        return settle_transfer(self.recipe, folder)

    def position_words(self) -> str:
        grid = self.recipe.pretrained_grid
        return f"; positions interpolated from those of {grid}" if grid else ""

    def check_start(self) -> None:
        from arvideo_ds.models.weight_files import weights_file

        if self.recipe.start.init_from is not None:
            _ = weights_file(Path(self.recipe.start.init_from))

    def initialize(self, module: Any, shards: AnyShards) -> str | None:
        source = self.recipe.start.init_from
        if source is None:
            return None
        lines = [str(self.load(module.model, Path(source), shards))]
        if grid := self.recipe.pretrained_grid:
            lines.append(f"  positions: interpolated, from {grid} to {self.recipe.geometry.grid}")
        return "\n".join(lines)

    @abstractmethod
    def load(self, model: Any, source: Path, shards: AnyShards) -> Any:
        """Load the initial weights; returns their `KeyReport`. Errors: `UserError`."""


class Transfer(StartTask):
    """A task that trains an encoder on labels."""

    recipe: TransferRecipe

    def __init__(self, recipe: TransferRecipe) -> None:
        super().__init__(recipe)
        self.layer_decay = recipe.transfer.layer_decay

    def model_words(self) -> str:
        return f"{self.recipe.task}, ViT-{self.recipe.model.size}"

    def token_words(self, plan: RunPlan) -> str:
        seen = plan.encoder_tokens
        encoded = "all" if seen == plan.num_tokens else seen
        return f", {encoded} encoded{self.position_words()}"

    def load(self, model: Any, source: Path, shards: AnyShards) -> Any:
        from arvideo_ds.models.layouts import load_classifier_weights

        same, patch = self.same_classes(source, shards), self.recipe.patch
        return load_classifier_weights(model, source, patch=patch, same_classes=same)

    def same_classes(self, source: Path, shards: AnyShards) -> bool | None:  # noqa: ARG002
        """Whether the initial weights have the outputs of this task; None where unknown."""
        return False


def settle_transfer(recipe: AnyStart, folder: Path) -> AnyStart:
    """The recipe with the choice of positions made, so that it alone rebuilds the model.

    folder: of the run, or of the run that it continues; a started run keeps its first choice, even
    without its initial weights. Errors: `UserError` where the source was trained with another
    encoder than the recipe's, or the positions are to be interpolated from an unknown clip.
    """
    start = recipe.start
    if (folder / run_folder.RECIPE).is_file():
        started = run_folder.read_recipe(folder, type(recipe)).start
        choices = ("positions", "pretrained_clip")
        update = {key: getattr(started, key) for key in choices if getattr(start, key) is None}
        if run_folder.has_checkpoints(folder):  # its initial weights are not read again
            update["init_from"] = started.init_from
    else:
        update = _choose_positions(recipe)
    settled = recipe.model_copy(update={recipe.task: start.model_copy(update=update)})
    _ = settled.pretrained_grid  # raises the error
    return settled


def _choose_positions(recipe: StartRecipe) -> dict[str, Any]:
    clip, positions = recipe.start.pretrained_clip, recipe.start.positions
    if recipe.start.init_from is not None:
        pretrained_clip, source = origin_of(Path(recipe.start.init_from))
        clip = clip or pretrained_clip
        if source is not None:
            _require_same_encoder(recipe, source, recipe.start.init_from)
    if positions is None:
        positions = "recomputed" if clip in (None, recipe.clip) else "interpolated"
    if positions == "recomputed":
        clip = None
    return {"positions": positions, "pretrained_clip": clip}


def origin_of(source: Path) -> tuple[Triple | None, EncoderRecipe | None]:
    """Clip (frames, rows, columns) of the position table of weights, and the recipe of their run.

    From a file beside them: a run's recipe, else transformers' config.json.
    """
    folder = source.parent if source.suffix == ".safetensors" else source
    if (folder / run_folder.RECIPE).is_file():
        recipe = run_folder.read_recipe(folder, EncoderRecipe)
        # A run that started from another one kept the table of that one.
        return recipe.pretrained_clip or recipe.clip, recipe
    try:
        facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        size = facts["image_size"]
        rows, columns = (size, size) if isinstance(size, int) else size
        return (int(facts["num_frames"]), int(rows), int(columns)), None
    # Files beside a public checkpoint may be anything.
    except (OSError, ValueError, KeyError, TypeError):
        return None, None


def _require_same_encoder(recipe: EncoderRecipe, source: EncoderRecipe, where: str) -> None:
    pairs = {
        "model.size": (source.model.size, recipe.model.size),
        "model.positions": (source.model.positions, recipe.model.positions),
        "model.patch": (list(source.patch), list(recipe.patch)),
    }
    # Sizes have default patches: one setting corrects both.
    if recipe.model.size != source.model.size and source.model.patch is recipe.model.patch is None:
        del pairs["model.patch"]
    wrong = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
    if wrong:
        listed = "; ".join(f"{key} was {was}, is {now}" for key, (was, now) in wrong.items())
        correct = " ".join(f"{key}={was}".replace(" ", "") for key, (was, _) in wrong.items())
        raise UserError(
            f"{where} was trained with another encoder than the recipe's ({listed}), so its "
            f"weights would mean nothing here. Add {correct}, or give other weights."
        )
