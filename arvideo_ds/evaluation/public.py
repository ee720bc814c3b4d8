"""Fine-tuned classifiers of other projects: VideoMAE, VideoMAE V2 and transformers.

They have no recipe. It is made here: the model from the shapes of the tensors; the clip from the
config.json and preprocessor_config.json of a folder of transformers; what neither has from
VideoMAE's test on Kinetics-400 (FINETUNE.md: 16 frames, one of 4, 224 x 224, 5 x 3 views).
Overrides replace any of it. No training setting of such a recipe means anything.
"""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from arvideo_ds.config import FinetuneRecipe
from arvideo_ds.config.load import AnySchema, parse, validate, with_overrides
from arvideo_ds.config.settings import Positive, Settings
from arvideo_ds.config.sizes import SIZES
from arvideo_ds.errors import UserError
from arvideo_ds.files.checksums import sha256_of
from arvideo_ds.geometry import Triple
from arvideo_ds.models.classifier import Classifier
from arvideo_ds.models.cubes import PIXEL_MEAN, PIXEL_STD
from arvideo_ds.models.encoder import Encoder
from arvideo_ds.models.layouts import (
    ClassifierShape,
    KeyReport,
    classifier_shape,
    load_classifier_weights,
)
from arvideo_ds.models.weight_files import (
    WEIGHTS_IN_A_FOLDER,
    State,
    read_weights,
    weights_file,
)
from arvideo_ds.runs import run_folder
from arvideo_ds.shards.datasets.listing import json_file, text_lines
from arvideo_ds.shards.manifest import ClassNames

# Files of a folder of transformers.
CONFIG, _PROCESSOR = "config.json", "preprocessor_config.json"
_PUBLISHED = "VideoMAE's test on Kinetics-400"
_TENSORS, _GIVEN = "the tensors", "given"
# transformers' conversion of VideoMAE's ViT-S has 16 heads, the published model 6.
_KNOWN_MISTAKE = (384, 16)
_LISTED = 3
_BILINEAR = 2  # PIL's number of the filter
_AboveZero = Annotated[float, Field(gt=0)]
_Colours = float | tuple[float, float, float]


class _Config(BaseModel):
    """What config.json of transformers' VideoMAE must have; other keys are not read."""

    model_config = ConfigDict(extra="ignore", use_attribute_docstrings=True)

    model_type: Literal["videomae"]
    image_size: Positive | tuple[Positive, Positive] = 224
    num_frames: Positive = 16
    num_channels: Literal[3] = 3
    num_attention_heads: Positive = 12
    hidden_act: Literal["gelu"] = "gelu"
    layer_norm_eps: Annotated[float, Field(le=1e-5)] = 1e-12
    """Below 1e-5 it changes logits by some millionths; the encoder here has 1e-6."""
    use_mean_pooling: Literal[True] = True
    """Classifiers of the first token, not of the mean of all, are not supported."""
    id2label: dict[int, str] | None = None

    @property
    def clip(self) -> Triple:
        size = self.image_size
        return (self.num_frames, *((size, size) if isinstance(size, int) else size))


class _Pixels(Settings):
    """Normalisation of pixels 0..1: minus mean, over std, per channel (red, green, blue)."""

    mean: tuple[float, float, float] = PIXEL_MEAN
    std: tuple[_AboveZero, _AboveZero, _AboveZero] = PIXEL_STD


class _Processor(BaseModel):
    """What preprocessor_config.json of transformers has; other keys are not read."""

    model_config = ConfigDict(extra="ignore")

    do_resize: bool = True
    resample: int = _BILINEAR
    size: Positive | dict[str, int | None] = 224
    do_rescale: bool = True
    rescale_factor: _AboveZero = 1 / 255
    do_normalize: bool = True
    image_mean: _Colours = PIXEL_MEAN
    image_std: _Colours = PIXEL_STD

    @property
    def short_side(self) -> int | None:
        """Pixels to which the shorter side is resized; None where the aspect is not kept."""
        if not self.do_resize:
            return None
        return self.size if isinstance(self.size, int) else self.size.get("shortest_edge")

    def notes(self) -> Iterator[str]:
        """What the preprocessing here does in another way."""
        if self.short_side is None:
            yield f"{_PROCESSOR} does not keep the aspect of frames; here the largest box is cut"
        if self.resample != _BILINEAR:
            yield f"{_PROCESSOR} resizes with filter {self.resample} of PIL, here bilinearly"

    @property
    def pixels(self) -> dict[str, list[float]]:
        """Mean and deviation of pixels 0..1."""
        scale = 255 * self.rescale_factor if self.do_rescale else 255.0
        mean, std = (self.image_mean, self.image_std) if self.do_normalize else (0.0, 1.0)
        both = (value if isinstance(value, tuple) else (value,) * 3 for value in (mean, std))
        return dict(zip(("mean", "std"), ([v / scale for v in each] for each in both), strict=True))


@dataclass(frozen=True)
class PublicOptions:
    """What the files of a public model do not tell. labels: file of its class names
    (`read_label_file`). overrides: settings of its recipe, also pixels.mean and pixels.std."""

    labels: Path | None = None
    overrides: Sequence[str] = ()

    def require_unused(self, run: Path) -> None:
        """Errors: `UserError` where options are given for a run."""
        if self.labels is not None or self.overrides:
            raise UserError(
                f"{run} is a run or its export, with a recipe and class names of its own; --labels "
                "and --override are for public models."
            )


NO_OPTIONS = PublicOptions()


@dataclass(frozen=True)
class PublicClassifier:
    """A classifier of another project, in evaluation mode, which normalises with its own mean and
    deviation. labels: in the order of the head; None where no file has them. settings: of the
    test, with the place that each is from."""

    path: Path
    recipe: FinetuneRecipe
    model: Classifier
    labels: tuple[str, ...] | None
    settings: Mapping[str, tuple[Any, str]]
    report: KeyReport

    @property
    def weights(self) -> Path:
        """The file of the weights."""
        return weights_file(self.path)

    def facts(self) -> dict[str, Any]:
        """For the files of results."""
        return {
            "path": str(self.path),
            "layout": self.report.layout,
            "weights_sha256": sha256_of(self.weights),
            "settings": {
                k: {"value": v, "from": origin} for k, (v, origin) in self.settings.items()
            },
            "notes": list(self.report.notes),
        }

    def __str__(self) -> str:
        rows = (f"  {k} {v} ({origin})" for k, (v, origin) in self.settings.items())
        return "\n".join([str(self.report), "settings of the test:", *rows])


def is_public(path: Path) -> bool:
    """Whether a path is, or was meant as, a model without a recipe."""
    if path.is_dir():
        has_recipe = (path / run_folder.RECIPE).is_file()
        names = (CONFIG, *WEIGHTS_IN_A_FOLDER)
        return not has_recipe and any((path / name).is_file() for name in names)
    return True


def read_public(
    path: Path,
    options: PublicOptions = NO_OPTIONS,
    *,
    needs_labels: bool = True,
    weights: str | None = None,
) -> PublicClassifier:
    """A folder of transformers' VideoMAEForVideoClassification, or a fine-tuned .pth of VideoMAE or
    VideoMAE V2. weights: None, the choice of a run's weights.

    Errors: `UserError` for a file that `read_weights` refuses, a model without a head or of another
    architecture, class names that do not fit the head (with needs_labels also missing ones), and
    settings that contradict the weights.
    """
    if weights is not None:
        raise UserError(f"--weights {weights}: {path} is not a run, and has one set of weights.")
    if path.name in WEIGHTS_IN_A_FOLDER and (path.parent / CONFIG).is_file():
        path = path.parent
    state = read_weights(path)
    shape = classifier_shape(state, path)
    _require_head(shape, path)
    config, processor = _read(path / CONFIG, _Config), _read(path / _PROCESSOR, _Processor)
    recipe, pixels, settings = _recipe(path, shape, config, processor, options.overrides)
    model, report = _load(path, state, recipe, shape, config)
    normalise_with(model.encoder, pixels.mean, pixels.std)
    labels, source = _labels(path, shape.classes or 0, config, options.labels)
    if labels is None and needs_labels:
        raise UserError(
            f"{path} does not name its {shape.classes} classes: give --labels FILE with one name "
            "per line, in the order of the head (VideoMAE V2's misc/label_map_k400.txt is such a "
            "file)."
        )
    if processor is not None:
        report = dataclasses.replace(report, notes=(*report.notes, *processor.notes()))
    settings["classes"] = (shape.classes, source)
    return PublicClassifier(path, recipe, model, labels, settings, report)


def normalise_with(encoder: Encoder, mean: Sequence[float], std: Sequence[float]) -> None:
    """Make an encoder, which normalises pixels with PIXEL_MEAN and PIXEL_STD, compute what it would
    with mean and std: (p - mean) / std is a x + b of the normalised x, per channel."""
    if (tuple(mean), tuple(std)) == (PIXEL_MEAN, PIXEL_STD):
        return
    ours, theirs = torch.tensor([[PIXEL_MEAN, PIXEL_STD], [mean, std]], dtype=torch.float64)
    weight = encoder.embed.weight.data
    by_channel = weight.double().unflatten(1, (-1, 3))
    shift = by_channel @ ((ours[0] - theirs[0]) / theirs[1])
    encoder.embed.bias.data += shift.sum(1).to(weight.dtype)
    weight.copy_((by_channel * (ours[1] / theirs[1])).flatten(1))


def read_label_file(path: Path) -> tuple[str, ...]:
    """Class names in the order of their numbers.

    .json: a list, or names by number, or numbers by name. .csv: columns id and name. Any other: one
    name per line. Errors: `UserError`.
    """
    if path.suffix == ".json":
        content = json_file(path, object)
        names = _numbered(path, content.items()) if isinstance(content, dict) else content
    elif path.suffix == ".csv":
        rows = list(csv.DictReader(text for _, text in text_lines(path)))
        if not rows or not {"id", "name"} <= rows[0].keys():
            raise UserError(f"{path} needs the columns id and name, with this header.")
        names = _numbered(path, ((row["id"], row["name"]) for row in rows))
    else:
        names = [text for _, text in text_lines(path)]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path} must be a list of class names, or an object of names and numbers.")
    names = [name.strip().strip('"') for name in names]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{path} has the class '{twice}' twice.")
    return tuple(names)


def class_numbers(
    names: Sequence[str], model: str, others: ClassNames | None, shards: str
) -> list[int]:
    """Place of each class of shards in a model's classes, by name.

    names: of the model. Case, spaces and punctuation do not count. Errors: `UserError` where
    the shards have a class that the model lacks.
    """
    if others is None or isinstance(others, Mapping):
        raise UserError(f"{shards} has no class names to compare with those of {model}.")
    key = _plain if all(len({*map(_plain, n)}) == len(n) for n in (names, others)) else str
    places = {key(name): number for number, name in enumerate(names)}
    if unknown := [name for name in others if key(name) not in places]:
        raise UserError(
            f"{len(unknown)} of the {len(others)} classes of {shards} are not among the "
            f"{len(names)} of {model}: {_some(unknown)}; the model has {_some(names)}. Give shards "
            "of the data set that it was trained on, or --labels FILE with the names in the order "
            "of its head."
        )
    return [places[key(name)] for name in others]


def order_in_words(numbers: Sequence[int], classes: int) -> str:
    """How the classes of shards (`class_numbers`) and of a model go together."""
    if len(numbers) < classes:
        return f"{len(numbers)} of the model's {classes} classes; predictions are among all"
    same = list(numbers) == list(range(classes))
    return "in the same order" if same else "in another order, renumbered by name as the model's"


def _require_head(shape: ClassifierShape, path: Path) -> None:
    if shape.patch is None:
        raise UserError(
            f"{path} has weights of this project, which need their recipe: give the folder of the "
            f"run, with {run_folder.RECIPE}."
        )
    if shape.classes is None:
        raise UserError(
            f"{path} has no head (head.weight or classifier.weight): it is a pretrained encoder and"
            f" classifies nothing. Fine-tune it (`arvideo finetune --init-from {path}`), or give "
            "the file of a fine-tuned model."
        )


def _read(path: Path, schema: type[AnySchema]) -> AnySchema | None:
    """A configuration of transformers; None where the file is missing. Errors: `UserError`."""
    return parse(schema, json_file(path, dict), str(path)) if path.is_file() else None


def _recipe(
    path: Path,
    shape: ClassifierShape,
    config: _Config | None,
    processor: _Processor | None,
    overrides: Sequence[str],
) -> tuple[FinetuneRecipe, _Pixels, dict[str, tuple[Any, str]]]:
    """The recipe, the normalisation, and every setting of them with its place."""
    values: dict[str, tuple[Any, str]] = {
        "model.size": (_size(shape, path), _TENSORS),
        "model.patch": (shape.patch, _TENSORS),
        "data.frames": (16, _PUBLISHED),
        "data.size": ([224, 224], _PUBLISHED),
        "data.sampling": ("dense", _PUBLISHED),
        "data.stride": (4, _PUBLISHED),
        "data.test_short_side": (None, _PUBLISHED),
        "evaluation.views": ([5, 3], _PUBLISHED),
        "pixels.mean": (PIXEL_MEAN, _PUBLISHED),
        "pixels.std": (PIXEL_STD, _PUBLISHED),
    }
    if config is not None:
        values["data.frames"] = config.clip[0], CONFIG
        values["data.size"] = config.clip[1:], CONFIG
    if processor is not None:
        read: dict[str, Any] = {"data.test_short_side": processor.short_side}
        read |= {f"pixels.{name}": value for name, value in processor.pixels.items()}
        values |= {key: (value, _PROCESSOR) for key, value in read.items()}
    given = [override.partition("=")[0].strip() for override in overrides]
    if "data.fps" in given:
        del values["data.stride"]
    tree: dict[str, Any] = {
        "task": "finetune",
        "train": {"max_steps": 1, "total_batch": 1, "micro_batch": 1},
    }
    tree = with_overrides(tree, [f"{key}={json.dumps(v)}" for key, (v, _) in values.items()])
    tree = with_overrides(tree, overrides)
    pixels = parse(_Pixels, tree.pop("pixels"), f"the settings of {path}")
    recipe = validate(tree, f"the settings of {path}", FinetuneRecipe)
    clip, start = config and config.clip, recipe.finetune
    if clip not in (None, recipe.clip) and start.positions is None:
        # Weights of transformers have the table of their config.json.
        update = {"positions": "interpolated", "pretrained_clip": clip}
        recipe = recipe.model_copy(update={"finetune": start.model_copy(update=update)})
        given += [f"finetune.{key}" for key in update]
    whole = {**recipe.model_dump(mode="json"), "pixels": pixels.model_dump(mode="json")}
    origins = {key: origin for key, (_, origin) in values.items()} | dict.fromkeys(given, _GIVEN)
    return recipe, pixels, {key: (_at(whole, key), origin) for key, origin in origins.items()}


def _at(tree: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        tree = tree[key]
    return tree


def _size(shape: ClassifierShape, path: Path) -> str:
    for name, size in SIZES.items():
        if (size.width, size.depth, size.mlp) == (shape.width, shape.depth, shape.mlp):
            return name
    raise UserError(
        f"{path} has width {shape.width}, depth {shape.depth} and MLPs of {shape.mlp}, none "
        f"of the sizes of this package: {', '.join(SIZES)}."
    )


def _load(
    path: Path,
    state: State,
    recipe: FinetuneRecipe,
    shape: ClassifierShape,
    config: _Config | None,
) -> tuple[Classifier, KeyReport]:
    """The classifier with all of its weights. Errors: `UserError`."""
    heads = recipe.size.heads
    theirs = heads if config is None else config.num_attention_heads
    if theirs != heads and (shape.width, theirs) != _KNOWN_MISTAKE:
        raise UserError(
            f"{path / CONFIG} has {theirs} attention heads, model.size={recipe.model.size} has "
            f"{heads}: the weights would mean something else."
        )
    model = Classifier(recipe.encoder, shape.classes or 0, pooling=recipe.pooling)
    report = load_classifier_weights(
        model, path, patch=recipe.patch, same_classes=True, state=state
    )
    loaded = {*(f"encoder.{name}" for name in report.loaded), *report.outside}
    if missing := [name for name in model.state_dict() if name not in loaded]:
        raise UserError(
            f"{path} ({report.layout}) lacks {_some(missing)}. A classifier is an encoder, "
            "the norm of its mean token (fc_norm) and a head; models that classify their first "
            "token, or have another norm, are not supported."
        )
    # All of it is loaded, the head too.
    notes = tuple(note for note in report.notes if not note.startswith("the head "))
    return model.eval(), dataclasses.replace(report, notes=notes)


def _labels(
    path: Path, classes: int, config: _Config | None, file: Path | None
) -> tuple[tuple[str, ...] | None, str]:
    """Class names in the order of the head, and the file that has them."""
    if file is not None:
        names, source, where = read_label_file(file), str(file), file
    elif config is not None and config.id2label is not None:
        source, where = CONFIG, path / CONFIG
        names = tuple(_numbered(where, config.id2label.items()))
    else:
        return None, _TENSORS
    if len(names) != classes:
        raise UserError(
            f"{where} has {len(names)} class names ('{names[0] if names else ''}' to "
            f"'{names[-1] if names else ''}'), but the head of {path} has {classes} classes. Give "
            "--labels FILE with one name per class, in the order of the head."
        )
    return names, source


def _numbered(path: Path, pairs: Iterable[tuple[Any, Any]]) -> list[str]:
    """Names in the order of their numbers; either of a pair may be the number."""
    by_number: dict[int, str] = {}
    for pair in pairs:
        first, second = map(str, pair)
        number, name = (first, second) if first.strip().isdecimal() else (second, first)
        if not number.strip().isdecimal():
            raise UserError(f"{path}: '{first}' and '{second}' are not a number and a name.")
        by_number[int(number)] = name
    if sorted(by_number) != list(range(len(by_number))):
        raise UserError(f"{path}: the numbers of the classes are not 0 to {len(by_number) - 1}.")
    return [by_number[number] for number in sorted(by_number)]


def _plain(name: str) -> str:
    return "".join(filter(str.isalnum, name.casefold()))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(f"'{name}'" for name in names[:_LISTED]) + more
