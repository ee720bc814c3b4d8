"""The teacher of a pretraining run: its choice, its weights, its hash.

Importing it needs no torch.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arvideo_ds.config import EncoderRecipe, PretrainRecipe, Recipe
from arvideo_ds.config.objectives import EMA
from arvideo_ds.config.sizes import SIZES, EncoderSpec
from arvideo_ds.errors import UserError
from arvideo_ds.files.checksums import sha256_of
from arvideo_ds.geometry import Geometry
from arvideo_ds.tasks.transfer import origin_of

if TYPE_CHECKING:
    from arvideo_ds.models.teacher import Teacher

# In run.json and checkpoints, of runs that have one.
TEACHER = "teacher"
_DECAY = 0.999


def settle_teacher(recipe: PretrainRecipe) -> PretrainRecipe:
    """The recipe with the teacher's size and clip, so that it alone rebuilds the run's model.

    Errors: `UserError` for a teacher of unknown size or clip, or whose tokens are not the recipe's.
    """
    objective = recipe.objective
    if objective.teacher is None:
        return recipe
    if objective.teacher == EMA:
        own = {"teacher_size": recipe.model.size, "teacher_clip": recipe.clip}
        return _with(recipe, {**own, "teacher_decay": objective.teacher_decay or _DECAY})
    where = Path(objective.teacher)
    clip, source = origin_of(where)
    if source is not None:
        _require_same_tokens(recipe, source, objective.teacher)
    size = _size_in_config(where) if source is None else source.model.size
    clip = objective.teacher_clip or clip
    if clip is None:
        raise UserError(
            f"objective.teacher={where} does not give the shape of its clips, whose positions it "
            "has: set objective.teacher_clip=[FRAMES,HEIGHT,WIDTH], such as [16,224,224]."
        )
    if any(side % step for side, step in zip(clip, recipe.patch, strict=True)):
        raise UserError(
            f"objective.teacher_clip={list(clip)} is not a multiple of model.patch="
            f"{list(recipe.patch)}; give the frames, height and width of the teacher's clips."
        )
    settled = _with(recipe, {"teacher_size": objective.teacher_size or size, "teacher_clip": clip})
    _ = settled.target_values  # raises the error of an unknown size
    return settled


def _with(recipe: PretrainRecipe, settings: dict[str, Any]) -> PretrainRecipe:
    return recipe.model_copy(update={"objective": recipe.objective.model_copy(update=settings)})


def _require_same_tokens(recipe: PretrainRecipe, source: EncoderRecipe, where: str) -> None:
    if source.model.name != "vit":
        raise UserError(
            f"objective.teacher={where} has the backbone {source.model.name}; a teacher must be a "
            "plain ViT (model.name: vit)."
        )
    if source.patch != recipe.patch:
        raise UserError(
            f"objective.teacher={where} cuts clips into cubes of {list(source.patch)} (frames, "
            f"rows, columns), the recipe into {list(recipe.patch)}: its tokens show other pixels "
            f"than the ones to predict. Set model.patch={list(source.patch)}, or give another "
            "teacher."
        )


def _size_in_config(folder: Path) -> str | None:
    """The size of the encoder in a config.json of transformers; None where it gives none."""
    try:
        facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        shape = facts["hidden_size"], facts["num_hidden_layers"]
    # Files beside a public checkpoint may be anything.
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return next((name for name, s in SIZES.items() if (s.width, s.depth) == shape), None)


def load_teacher(recipe: PretrainRecipe) -> Teacher | None:
    """The teacher of a settled recipe in the run's precision, on the CPU; None without one.

    An ema has no weights yet: the engine copies them (engine/fragments.py). Errors: `UserError`, as
    `load_encoder`.
    """
    import torch

    from arvideo_ds.models.encoder import build_encoder
    from arvideo_ds.models.layouts import load_encoder
    from arvideo_ds.models.teacher import Teacher

    objective, size = recipe.objective, recipe.objective.teacher_shape
    if objective.teacher is None or size is None:
        return None
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = dtypes[recipe.train.precision]
    if objective.teacher == EMA:
        report = f"a moving average of the encoder, decay {recipe.ema_decay}"
        return Teacher(build_encoder(recipe.encoder), recipe.patch, dtype, report)
    _, source = origin_of(Path(objective.teacher))
    spec = EncoderSpec(
        Geometry.whole(recipe.clip, recipe.patch),
        size,
        "sincos_1d" if source is None else source.model.positions,
        Geometry.whole(objective.teacher_clip or recipe.clip, recipe.patch).grid,
    )
    encoder = build_encoder(spec)
    report = str(load_encoder(encoder, objective.teacher, patch=recipe.patch))
    return Teacher(encoder, recipe.patch, dtype, report)


def teacher_facts(recipe: Recipe) -> dict[str, Any]:
    """The entry `TEACHER` of run.json: where its weights are, their hash; {} for ema or none."""
    where = recipe.teacher
    if where is None or where == EMA:
        return {}
    return {TEACHER: {"origin": where, "sha256": _hash(where)}}


@functools.cache
def _hash(where: str) -> str:
    """SHA-256 of the file of weights; gigabytes are read once."""
    from arvideo_ds.models.weight_files import weights_file

    return sha256_of(weights_file(Path(where)))
