"""Test a fine-tuned run or a public classifier over all ranks and write the result."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from arvideo_ds.config import FinetuneRecipe
from arvideo_ds.data.loader import worker_count
from arvideo_ds.engine.world import find_world, start_world
from arvideo_ds.evaluation.pictures import draw_confusion
from arvideo_ds.evaluation.pretrained import load_classifier
from arvideo_ds.evaluation.public import PublicClassifier, class_numbers, order_in_words
from arvideo_ds.evaluation.scores import AnyScores, JointScores, Scores, score_videos
from arvideo_ds.files.atomic import write_json
from arvideo_ds.models.classifier import Classifier
from arvideo_ds.runs import run_folder
from arvideo_ds.shards.manifest import ClassNames, ShardSet, by_set, require_same_labels

_MOST_LISTED = 100


def evaluate(
    folder: Path,
    recipe: FinetuneRecipe,
    where: str,
    *,
    views: tuple[int, int],
    name: str,
    alone: bool = False,
) -> dict[str, Any]:
    """Score all videos of the shards `where` with the weights `name`. Collective, unless `alone`.

    name: of `run_folder.WEIGHTS`, also in files and result; the main rank writes them. Errors:
    `UserError`, also for other labels.
    """
    shards = ShardSet(where)
    model, labels = load_classifier(recipe, folder, run_folder.WEIGHTS[name])
    shard_labels = shards.manifest.class_names(recipe.heads)
    require_same_labels(str(folder), labels, shards.name, shard_labels)
    facts: dict[str, Any] = {"weights": name, "shards": where}
    if recipe.finetune.head_grid:
        facts["head_chosen_on"] = recipe.evaluation.shards
    return _test(folder, model, labels, recipe, shards, views, facts, alone=alone)


def evaluate_public(
    public: PublicClassifier, where: str, output: Path, *, alone: bool = False
) -> dict[str, Any]:
    """`evaluate` of a public model, with the views of its recipe, into the folder `output`.
    Collective, unless `alone`.

    Classes of the shards are found by name among the model's, and numbered as those. Errors:
    `UserError`.
    """
    shards, recipe = ShardSet(where), public.recipe
    labels, names = public.labels or (), shards.manifest.class_names()
    numbers = class_numbers(labels, str(public.path), names, shards.name)
    classes = order_in_words(numbers, len(labels))
    facts = {
        "weights": public.weights.stem,
        "shards": where,
        "classes": classes,
        "public": public.facts(),
    }
    text = f"{public}\n  the shards' classes are {classes}"
    options: dict[str, Any] = {"numbers": numbers, "heading": text, "alone": alone}
    views = recipe.evaluation.views
    return _test(output, public.model, labels, recipe, shards, views, facts, **options)


def _test(
    folder: Path,
    model: Classifier,
    labels: ClassNames,
    recipe: FinetuneRecipe,
    shards: ShardSet,
    views: tuple[int, int],
    facts: dict[str, Any],
    *,
    numbers: Sequence[int] | None = None,
    heading: str | None = None,
    alone: bool = False,
) -> dict[str, Any]:
    """Score all videos and write the result. numbers: of the shards' classes in `labels`; None = in
    the same order. facts: for the result. heading: printed before."""
    world = find_world() if alone else start_world()
    if heading is not None and world.is_main:
        print(heading, flush=True)
    model = model.to(world.device)
    with torch.no_grad():
        scores = score_videos(
            lambda batch: model(batch.clips, views=recipe.joint(views)),
            shards,
            recipe,
            views=views,
            batch=max(recipe.evaluation.batch, views[0] * views[1]),
            num_workers=worker_count(recipe, cores=world.cores),
            device=world.device,
            progress=f"test on {shards.name}",
        )
    if numbers is not None:
        scores = dataclasses.replace(scores, labels=_renumbered(scores.labels, numbers))
    result = {
        **_accuracies(scores, labels),
        "views": list(views),
        **facts,
        "manifest": shards.hash,
        "ranks": 1 if alone else world.size,
        "recipe": recipe.model_dump(mode="json"),
    }
    if world.is_main:
        _write(folder, scores, labels, result)
    if not alone:
        dist.barrier()
        dist.destroy_process_group()
    return result


def _renumbered(labels: Tensor, numbers: Sequence[int]) -> Tensor:
    """Labels V with `numbers` of them in place of their own; -1 stays."""
    return torch.where(labels < 0, labels, torch.tensor(numbers)[labels.clamp(min=0)])


def _accuracies(scores: AnyScores, labels: ClassNames) -> dict[str, Any]:
    """Percent, without unreadable videos; top1 and top5 require the labels of all label sets."""
    missing = scores.labels.view(len(scores.labels), -1) < 0
    names = by_set(labels)
    sets = {name: _of_classes(part, names[name]) for name, part in _by_set(scores).items()}
    return {
        "top1": 100 * scores.accuracy(),
        "top5": 100 * scores.accuracy(5),
        "loss": scores.loss(),
        "videos": len(scores.labels),
        "unlabelled": int(missing.any(dim=1).sum()),
        "unreadable": len(scores.skipped),
        "unreadable_videos": [dataclasses.asdict(s) for s in scores.skipped[:_MOST_LISTED]],
        **({"label_sets": sets} if isinstance(scores, JointScores) else sets[""]),
    }


def _by_set(scores: AnyScores) -> dict[str, Scores]:
    """The scores by label set; those of a single label by ''."""
    return dict(scores.sets) if isinstance(scores, JointScores) else {"": scores}


def _of_classes(scores: Scores, labels: list[str]) -> dict[str, Any]:
    confusion = scores.confusion()
    totals, hits = confusion.sum(1), confusion.diagonal()
    return {
        "top1": 100 * scores.accuracy(),
        "top5": 100 * scores.accuracy(5),
        "mean_class_accuracy": float(100 * (hits / totals)[totals > 0].mean()),
        "per_class": {
            label: {"videos": int(total), "top1": float(100 * hit / total) if total else None}
            for label, total, hit in zip(labels, totals, hits, strict=True)
        },
    }


def _write(folder: Path, scores: AnyScores, labels: ClassNames, result: dict[str, Any]) -> None:
    views = "x".join(map(str, result["views"]))
    stem = f"{Path(result['shards']).name}-{result['weights']}-{views}"
    target = folder / "evaluation"
    target.mkdir(parents=True, exist_ok=True)
    write_json(target / f"{stem}.json", result)
    tensors = {"labels": scores.labels, "valid": scores.valid}
    for name, part in _by_set(scores).items():
        suffix = f"-{name}" if name else ""
        tensors[f"probabilities{suffix}"] = part.probabilities
        figure = draw_confusion(part.confusion(), by_set(labels)[name])
        figure.savefig(target / f"{stem}{suffix}.png", dpi=110)
    save_file(tensors, target / f"{stem}.safetensors")
    brief = {key: result[key] for key in ("top1", "top5", "views", "weights", "manifest")}
    sets = result.get("label_sets", {})
    brief |= {f"{name}_top1": part["top1"] for name, part in sets.items()}
    run_folder.update_summary(folder, {f"test_{stem}": brief})
    if result.get("head_chosen_on") == result["shards"]:
        print("note: the head was chosen on these videos, as in V-JEPA 2; --shards tests others.")
    each = "".join(f", {name} {_percent(part)}" for name, part in sets.items())
    print(
        f"{result['videos']} videos, {result['unreadable']} unreadable, weights "
        f"{result['weights']}: {_percent(result)}{each}; per class: "
        f"{target / stem}.json, confusion: {stem}*.png",
        flush=True,
    )


def _percent(result: dict[str, Any]) -> str:
    return f"top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %"
