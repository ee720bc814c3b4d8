"""What pretrained weights say of themselves, held against the recipe; needs no torch.

Two things do not show in weights: which table of positions they were trained with, and over which
token grid. A run's recipe says both, and a `config.json` of transformers the clip.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from arvideo_ds.config import Recipe
from arvideo_ds.config.load import AnyRecipe
from arvideo_ds.config.schema import TransferSettings
from arvideo_ds.errors import UserError
from arvideo_ds.geometry import Triple
from arvideo_ds.runs import run_folder

_SETTLED = ("positions", "pretrained_clip")


@dataclass(frozen=True)
class Origin:
    """Where weights come from.

    clip: frames, rows and columns whose table of positions they know. recipe: their run's.
    """

    clip: Triple
    recipe: Recipe | None = None


def settle_transfer(recipe: AnyRecipe, folder: Path) -> AnyRecipe:
    """The recipe with the choice of positions made, so that it alone rebuilds the model.

    folder: of the run; one that has begun keeps the choice it began with, whether or not its
    pretrained weights are still there. Errors: `UserError` where the source was trained with
    another encoder than the recipe's, or what is to be interpolated is not known.
    """
    transfer = recipe.transfer
    if transfer is None:
        return recipe
    begun = _begun(folder)
    settled = _as_begun(transfer, begun) if begun else _chosen(recipe, transfer)
    out = recipe.model_copy(update={recipe.task: settled})
    _ = out.pretrained_grid
    return out


def origin_of(source: Path) -> Origin | None:
    """What lies beside the weights of a path: a run's recipe, else transformers' config.json."""
    # What lies beside a file of other people may be anything.
    folder = source.parent if source.suffix == ".safetensors" else source
    if (folder / run_folder.RECIPE).is_file():
        recipe = run_folder.read_recipe(folder, *run_folder.WITH_ENCODER)
        transfer = recipe.transfer
        # Its weights know the table that its own pretraining knew.
        if transfer is not None and recipe.pretrained_grid and transfer.pretrained_clip:
            return Origin(transfer.pretrained_clip, recipe)
        return Origin(recipe.clip, recipe)
    try:
        facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        size = facts["image_size"]
        rows, columns = (size, size) if isinstance(size, int) else size
        return Origin((int(facts["num_frames"]), int(rows), int(columns)))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _begun(folder: Path) -> TransferSettings | None:
    if not (folder / run_folder.RECIPE).is_file():
        return None
    return run_folder.read_recipe(folder, Recipe).transfer


def _as_begun(transfer: TransferSettings, begun: TransferSettings) -> TransferSettings:
    kept = {key: getattr(begun, key) for key in _SETTLED if getattr(transfer, key) is None}
    return transfer.model_copy(update=kept)


def _chosen(recipe: Recipe, transfer: TransferSettings) -> TransferSettings:
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


def _require_same_encoder(recipe: Recipe, source: Recipe, where: str) -> None:
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
