"""The teacher of a run: its choice, its weights, its hash.

Importing it needs no torch.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from arvideo_ds.config import EncoderRecipe, FinetuneRecipe, PretrainRecipe, Recipe
from arvideo_ds.config.sizes import SIZES, EncoderSpec
from arvideo_ds.config.teachers import EMA
from arvideo_ds.errors import UserError
from arvideo_ds.files.checksums import sha256_of
from arvideo_ds.geometry import Geometry
from arvideo_ds.tasks.transfer import origin_of

if TYPE_CHECKING:
    import torch

    from arvideo_ds.models.classifier import Classifier
    from arvideo_ds.models.encoder import Encoder
    from arvideo_ds.models.teacher import Teacher

AnyTaught = TypeVar("AnyTaught", PretrainRecipe, FinetuneRecipe)
# In run.json and checkpoints, of runs that have one.
TEACHER = "teacher"
_DECAY = 0.999


def settle_teacher(recipe: AnyTaught) -> AnyTaught:
    """The recipe with the size, patch and clip of its teacher, so that it alone rebuilds the model.

    Errors: `UserError` for a teacher of unknown size or clip, with other tokens than pretraining
    predicts, or without a head where its class scores are learnt.
    """
    if recipe.teacher is None:
        return recipe
    settings = getattr(recipe, recipe.teacher_section)
    if recipe.teacher == EMA:
        own = {"teacher_size": recipe.model.size, "teacher_clip": recipe.clip}
        return _with(recipe, {**own, "teacher_decay": settings.teacher_decay or _DECAY})
    where, key = Path(recipe.teacher), f"{recipe.teacher_section}.teacher"
    clip, source = origin_of(where)
    size, update = _size_in_config(where), dict[str, Any]()
    if source is not None:
        update = _of_source(recipe, source, where)
        size = source.model.size
    clip = settings.teacher_clip or clip
    if clip is None:
        raise UserError(
            f"{key}={where} does not give the shape of its clips, whose positions it has: set "
            f"{key}_clip=[FRAMES,HEIGHT,WIDTH], such as [16,224,224]."
        )
    update |= {"teacher_size": settings.teacher_size or size, "teacher_clip": clip}
    settled = _with(recipe, update)
    shape = settled.transformer.teacher  # raises the error of an unknown size
    assert shape is not None
    patch = shape.geometry.patch
    if any(side % step for side, step in zip(clip, patch, strict=True)):
        named = f"{key}_patch" if shape.scores else "model.patch"
        raise UserError(
            f"{key}_clip={list(clip)} is not a multiple of {named}={list(patch)}; give the frames, "
            "height and width of the teacher's clips."
        )
    return settled


def _with(recipe: AnyTaught, settings: dict[str, Any]) -> AnyTaught:
    section = getattr(recipe, recipe.teacher_section)
    return recipe.model_copy(update={recipe.teacher_section: section.model_copy(update=settings)})


def _of_source(
    recipe: PretrainRecipe | FinetuneRecipe, source: EncoderRecipe, where: Path
) -> dict[str, Any]:
    """Settings that follow from the recipe of the teacher's run. Errors: as `settle_teacher`."""
    section = recipe.teacher_section
    if source.model.name != "vit":
        raise UserError(
            f"{section}.teacher={where} has the backbone {source.model.name}; a teacher must be a "
            "plain ViT (model.name: vit)."
        )
    if recipe.learns_labels:
        if source.task != recipe.task:
            raise UserError(
                f"finetune.teacher={where} is of {source.run_name}, which has no class scores. "
                f"Fine-tune it first (arvideo finetune --init-from {where}), or give another one."
            )
        return {"teacher_patch": getattr(recipe, section).teacher_patch or source.patch}
    if source.patch != recipe.patch:
        raise UserError(
            f"objective.teacher={where} cuts clips into cubes of {list(source.patch)} (frames, "
            f"rows, columns), the recipe into {list(recipe.patch)}: its tokens show other pixels "
            f"than the ones to predict. Set model.patch={list(source.patch)}, or give another "
            "teacher."
        )
    return {}


def _size_in_config(folder: Path) -> str | None:
    """The size of the encoder in a config.json of transformers; None where it gives none."""
    try:
        facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        shape = facts["hidden_size"], facts["num_hidden_layers"]
    # Files beside a public checkpoint may be anything.
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return next((name for name, s in SIZES.items() if (s.width, s.depth) == shape), None)


def load_teacher(recipe: PretrainRecipe) -> Teacher[Encoder] | None:
    """The teacher of a settled recipe in the run's precision, on the CPU; None without one.

    An ema has no weights yet: the engine copies them (engine/fragments.py). Errors: `UserError`, as
    `load_encoder`.
    """
    from arvideo_ds.models.encoder import build_encoder
    from arvideo_ds.models.layouts import load_encoder
    from arvideo_ds.models.teacher import Teacher

    where = recipe.teacher
    if where is None:
        return None
    if where == EMA:
        report = f"a moving average of the encoder, decay {recipe.ema_decay}"
        return Teacher(build_encoder(recipe.encoder), _precision(recipe), report)
    encoder = build_encoder(_spec(recipe))
    report = str(load_encoder(encoder, where, patch=recipe.patch))
    return Teacher(encoder, _precision(recipe), report)


def load_classifying_teacher(
    recipe: FinetuneRecipe, num_classes: int
) -> Teacher[Classifier] | None:
    """As `load_teacher`, with its head. num_classes: of all label sets.

    Errors: `UserError` for weights of another shape, or without a head of so many classes.
    """
    from arvideo_ds.evaluation.pretrained import read_labels
    from arvideo_ds.models.classifier import Classifier
    from arvideo_ds.models.layouts import load_classifier_weights
    from arvideo_ds.models.teacher import Teacher

    if recipe.teacher is None:
        return None
    where, spec = Path(recipe.teacher), _spec(recipe)
    source = origin_of(where)[1]
    pooling, depth = ("mean", 1) if source is None else (source.pooling, source.pooling_depth)
    model = Classifier(spec, num_classes, pooling=pooling, pooling_depth=depth)
    # Names were compared before the start (specs/finetune.py).
    same = None if read_labels(where if where.is_dir() else where.parent) is None else True
    try:
        report = load_classifier_weights(model, where, patch=spec.geometry.patch, same_classes=same)
    except UserError as error:
        raise UserError(
            f"{error} These are weights of finetune.teacher, whose shape finetune.teacher_size and "
            "finetune.teacher_patch give."
        ) from None
    outside = [name for name in model.state_dict() if not name.startswith("encoder.")]
    if lacking := [*report.missing, *(name for name in outside if name not in report.outside)]:
        raise UserError(
            f"finetune.teacher={where} does not score the {num_classes} classes of the shards: "
            f"{', '.join(lacking[:4])} could not be loaded. Give a model that was fine-tuned on "
            f"these classes.\n{report}"
        )
    return Teacher(model, _precision(recipe), str(report))


def _spec(recipe: PretrainRecipe | FinetuneRecipe) -> EncoderSpec:
    """Of a teacher with weights of its own, on the run's clips."""
    shape, where = recipe.transformer.teacher, recipe.teacher
    assert shape is not None
    assert where is not None
    source = origin_of(Path(where))[1]
    positions = "sincos_1d" if source is None else source.model.positions
    clip, patch = getattr(recipe, recipe.teacher_section).teacher_clip, shape.geometry.patch
    pretrained = Geometry.whole(clip or recipe.clip, patch).grid
    return EncoderSpec(Geometry.whole(recipe.clip, patch), shape.size, positions, pretrained)


def _precision(recipe: Recipe) -> torch.dtype:
    import torch

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return dtypes[recipe.train.precision]


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
