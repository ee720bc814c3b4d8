"""What the tasks share that train a pretrained encoder on labels; reading it needs no torch.

Two things do not show in weights: which table of positions they were trained with, and over which
token grid. A run's recipe says both, and a `config.json` of transformers the clip.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from arvideo_ds.config import EncoderRecipe, TransferRecipe
from arvideo_ds.config.transfer import TransferSettings
from arvideo_ds.errors import UserError
from arvideo_ds.geometry import Triple
from arvideo_ds.planning.plan import RunPlan
from arvideo_ds.runs import run_folder
from arvideo_ds.shards.manifest import ShardSet
from arvideo_ds.tasks.task import Task

_SETTLED = ("positions", "pretrained_clip")
AnyTransfer = TypeVar("AnyTransfer", bound=TransferRecipe)


class Transfer(Task):
    """A task whose recipe has a section of `TransferSettings`."""

    recipe: TransferRecipe

    def __init__(self, recipe: TransferRecipe) -> None:
        super().__init__(recipe)
        self.layer_decay, self.ema_decay = recipe.transfer.layer_decay, recipe.transfer.ema_decay

    def settled(self, folder: Path) -> TransferRecipe:
        return settle_transfer(self.recipe, folder)

    def model_words(self) -> str:
        return f"{self.recipe.task}, ViT-{self.recipe.model.size}"

    def token_words(self, plan: RunPlan) -> str:
        grid, seen = self.recipe.pretrained_grid, plan.encoder_tokens
        encoded = "all" if seen == plan.num_tokens else seen
        positions = f"; positions interpolated from those of {grid}" if grid else ""
        return f", {encoded} encoded{positions}"

    def initialize(self, module: Any, shards: ShardSet) -> str | None:
        from arvideo_ds.models.layouts import load_classifier_weights

        source = self.recipe.transfer.init_from
        if source is None:
            return None
        same = self.same_classes(Path(source), shards)
        patch = self.recipe.patch
        return str(load_classifier_weights(module.model, source, patch=patch, same_classes=same))

    def same_classes(self, source: Path, shards: ShardSet) -> bool | None:  # noqa: ARG002
        """Whether weights to begin with have the outputs of this task; None where unknown."""
        return False


@dataclass(frozen=True)
class Origin:
    """Where weights come from.

    clip: frames, rows and columns whose table of positions they know. recipe: their run's.
    """

    clip: Triple
    recipe: EncoderRecipe | None = None


def settle_transfer(recipe: AnyTransfer, folder: Path) -> AnyTransfer:
    """The recipe with the choice of positions made, so that it alone rebuilds the model.

    folder: of the run; one that has started keeps its first choice, whether or not its
    pretrained weights are still there. Errors: `UserError` where the source was trained with
    another encoder than the recipe's, or what is to be interpolated is not known.
    """
    transfer = recipe.transfer
    if (folder / run_folder.RECIPE).is_file():
        settled = _as_started(transfer, run_folder.read_recipe(folder, type(recipe)).transfer)
    else:
        settled = _chosen(recipe, transfer)
    out = recipe.model_copy(update={recipe.task: settled})
    _ = out.pretrained_grid
    return out


def origin_of(source: Path) -> Origin | None:
    """What a file beside the weights says: a run's recipe, else transformers' config.json."""
    # Files beside a public checkpoint may be anything.
    folder = source.parent if source.suffix == ".safetensors" else source
    if (folder / run_folder.RECIPE).is_file():
        recipe = run_folder.read_recipe(folder, EncoderRecipe)
        # Its weights know the table that its own pretraining knew.
        return Origin(recipe.pretrained_clip or recipe.clip, recipe)
    try:
        facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        size = facts["image_size"]
        rows, columns = (size, size) if isinstance(size, int) else size
        return Origin((int(facts["num_frames"]), int(rows), int(columns)))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _as_started(transfer: TransferSettings, started: TransferSettings) -> TransferSettings:
    kept = {key: getattr(started, key) for key in _SETTLED if getattr(transfer, key) is None}
    return transfer.model_copy(update=kept)


def _chosen(recipe: EncoderRecipe, transfer: TransferSettings) -> TransferSettings:
    origin = None if transfer.init_from is None else origin_of(Path(transfer.init_from))
    if origin is not None and origin.recipe is not None:
        _require_same_encoder(recipe, origin.recipe, str(transfer.init_from))
    clip = transfer.pretrained_clip or (origin.clip if origin else None)
    positions = transfer.positions
    if positions is None:
        positions = "recomputed" if clip in (None, recipe.clip) else "interpolated"
    if positions == "recomputed":
        clip = None
    return transfer.model_copy(update={"positions": positions, "pretrained_clip": clip})


def _require_same_encoder(recipe: EncoderRecipe, source: EncoderRecipe, where: str) -> None:
    pairs = {
        "model.size": (source.model.size, recipe.model.size),
        "model.positions": (source.model.positions, recipe.model.positions),
        "model.patch": (list(source.patch), list(recipe.patch)),
    }
    # Another size often has another patch of its own: one setting mends both.
    if recipe.model.size != source.model.size and source.model.patch is recipe.model.patch is None:
        del pairs["model.patch"]
    wrong = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
    if wrong:
        listed = "; ".join(f"{key} was {was}, is {now}" for key, (was, now) in wrong.items())
        mended = " ".join(f"{key}={was}".replace(" ", "") for key, (was, _) in wrong.items())
        raise UserError(
            f"{where} was trained with another encoder than the recipe's ({listed}), so its "
            f"weights would mean nothing here. Add {mended}, or give other weights."
        )
