"""Testing a fine-tuned run over all ranks, and writing down what came out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from matplotlib import pyplot as plt
from safetensors.torch import save_file

from arvideo_ds.config import FinetuneRecipe
from arvideo_ds.data.loader import worker_count
from arvideo_ds.data.manifest import ShardSet, require_same_labels
from arvideo_ds.engine.world import start_world
from arvideo_ds.evaluation.confusion import draw_confusion
from arvideo_ds.evaluation.pretrained import load_classifier
from arvideo_ds.evaluation.scores import Scores, score_videos
from arvideo_ds.train import run_folder

FOLDER = "evaluation"
_MOST_LISTED = 100


def evaluate(
    folder: Path,
    recipe: FinetuneRecipe,
    where: str,
    *,
    views: tuple[int, int],
    name: str,
) -> dict[str, Any]:
    """Score all videos of the shards `where` with the weights `name`. Collective.

    name: of `run_folder.WEIGHTS`, also in files and result; the main rank writes them. Errors:
    `UserError`, also for other labels.
    """
    shards = ShardSet(where)
    model, labels = load_classifier(recipe, folder, run_folder.WEIGHTS[name])
    require_same_labels(str(folder), labels, shards.name, shards.manifest.labels)
    world = start_world()
    model = model.to(world.device)
    with torch.no_grad():
        scores = score_videos(
            lambda batch: model(batch.clips),
            shards,
            recipe,
            views=views,
            batch=max(recipe.evaluation.batch, views[0] * views[1]),
            num_workers=worker_count(recipe, cores=world.cores),
            device=world.device,
            progress=f"test on {shards.name}",
        )
    result = {
        **accuracies(scores, labels),
        "views": list(views),
        "weights": name,
        "shards": where,
        "manifest": shards.hash,
        "ranks": world.size,
        "recipe": recipe.model_dump(mode="json"),
    }
    if world.is_main:
        _write(folder, scores, labels, result)
    dist.barrier()
    dist.destroy_process_group()
    return result


def accuracies(scores: Scores, labels: list[str]) -> dict[str, Any]:
    """Percent; unreadable videos are counted, listed, and left out of the accuracies."""
    confusion = scores.confusion()
    totals, hits = confusion.sum(1), confusion.diagonal()
    return {
        "top1": 100 * scores.accuracy(),
        "top5": 100 * scores.accuracy(5),
        "mean_class_accuracy": float(100 * (hits / totals)[totals > 0].mean()),
        "loss": scores.loss(),
        "videos": len(scores.labels),
        "unlabelled": int((scores.labels < 0).sum()),
        "unreadable": len(scores.skipped),
        "unreadable_videos": [dataclasses.asdict(s) for s in scores.skipped[:_MOST_LISTED]],
        "per_class": {
            label: {"videos": int(total), "top1": float(100 * hit / total) if total else None}
            for label, total, hit in zip(labels, totals, hits, strict=True)
        },
    }


def _write(folder: Path, scores: Scores, labels: list[str], result: dict[str, Any]) -> None:
    stem = (
        f"{Path(result['shards']).name}-{result['weights']}-{'x'.join(map(str, result['views']))}"
    )
    target = folder / FOLDER
    target.mkdir(exist_ok=True)
    (target / f"{stem}.json").write_text(json.dumps(run_folder.finite(result), indent=1) + "\n")
    tensors = {
        "probabilities": scores.probabilities,
        "labels": scores.labels,
        "valid": scores.valid,
    }
    save_file(tensors, target / f"{stem}.safetensors")
    figure = draw_confusion(scores.confusion(), labels)
    figure.savefig(target / f"{stem}.png", dpi=110)
    plt.close(figure)
    brief = {key: result[key] for key in ("top1", "top5", "views", "weights", "manifest")}
    run_folder.update_summary(folder, {f"test_{stem}": brief})
    print(
        f"{result['videos']} videos, {result['unreadable']} unreadable, weights "
        f"{result['weights']}: top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %; see "
        f"{target / stem}.json",
        flush=True,
    )
