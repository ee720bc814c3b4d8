#!/usr/bin/env python3
"""Draw a finished run: loss, probes, and clips as it predicts them, in one report.html.

python scripts/report.py runs/demo
python scripts/report.py runs/my_run --shards SHARDS --clips 4
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from arvideo_ds.arguments import CommandParser
from arvideo_ds.config import PretrainRecipe
from arvideo_ds.config.load import validate
from arvideo_ds.data.clips import EvaluationClips
from arvideo_ds.data.manifest import ShardSet
from arvideo_ds.errors import UserError, command
from arvideo_ds.evaluation import pictures, report
from arvideo_ds.evaluation.pretrained import load_pretrained
from arvideo_ds.randomness import draw_key
from arvideo_ds.train import run_folder

FEATURES = {
    "mean": "mean of the tokens",
    "change": "mean of the tokens of the later times less that of the earlier times",
}
HOW_PREDICTED = {
    "arvideo": (
        "Each step predicts one more cluster (outlined) from the kept tokens of the clusters "
        "before it in the sampled order; the first cluster is given. The newest cluster is drawn "
        "over what earlier steps predicted, nothing is fed back."
    ),
    "videomae": "The hidden tokens are predicted at once from those that are seen.",
    "lvmae": "The chosen tokens are predicted at once from those that are seen.",
}


@command
def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--shards", help="clips to show; default: probe.test_shards, data.shards")
    parser.add_argument("--clips", type=int, default=3)
    args = parser.parse_args()
    recipe = run_folder.read_recipe(args.run, PretrainRecipe)
    metrics = run_folder.read_metrics(args.run)
    if not metrics:
        raise UserError(f"{args.run} has no metrics yet; train it first.")
    summary = json.loads((args.run / run_folder.SUMMARY).read_text())
    parts = [report.table(facts(recipe, summary))]
    parts.append(report.section("Loss", "Mean over all ranks.", [pictures.draw_loss(metrics)]))
    if "linear_probe_accuracy" in summary:
        note = (
            f"Frozen encoder, {FEATURES[summary['probe_features']]} of the central clip of each "
            "test video. Untrained: the same encoder with the weights that training began with."
        )
        parts.append(report.section("Probes", note, [pictures.draw_probes(summary)]))
    parts.append(predictions(args.run, recipe, args.shards, args.clips))
    path = args.run / "report.html"
    report.write_page(path, f"arvideo_ds: {args.run.name}", parts)
    print(f"report: {path}")


def facts(recipe: PretrainRecipe, summary: dict[str, Any]) -> list[tuple[str, Any]]:
    plan = summary["plan"]
    return [
        ("objective", ", ".join(f"{k} {v}" for k, v in recipe.objective.model_dump().items())),
        (
            "encoder",
            f"ViT-{recipe.model.size}, {plan['parameters_encoder'] / 1e6:.1f} M parameters",
        ),
        ("clip", " x ".join(map(str, plan["clip_shape"]))),
        ("clusters", f"{plan['num_clusters']} of {plan['cluster_size']} tokens"),
        ("encoded / predicted tokens", f"{plan['encoder_tokens']} / {plan['decoder_queries']}"),
        ("steps", f"{summary['steps']} of {plan['total_batch']} clips"),
        ("last start took", f"{summary['train_seconds_of_last_start'] / 60:.1f} min"),
        ("commit", summary["commit"]),
    ]


def predictions(run: Path, recipe: PretrainRecipe, shards: str | None, count: int) -> str:
    if recipe.objective.needs_scores(recipe.decoder):
        note = "Left out: what is predicted depends on data.scores, as training delivers them."
        return report.section("Predictions", note, [])
    folder = shards or recipe.probe.test_shards or recipe.data.shards
    if folder is None:
        raise UserError("the recipe names no shards to show clips of; give --shards SHARDS.")
    # The picture wants every token predicted, whatever share the loss was taken on.
    tree = recipe.model_dump()
    tree["decoder"] |= {"target_ratio": 1.0, "target_rule": "random"}
    model = load_pretrained(validate(tree, "recipe"), run / run_folder.MODEL)
    clips = EvaluationClips(ShardSet(folder), recipe)
    figures = []
    for number in range(min(count, len(clips))):
        key = draw_key(recipe.train.seed, 0, number, 0)
        prediction = pictures.predict_clip(model, clips[number].clips[0], key, recipe)
        figures.append(pictures.draw_prediction(prediction, f"clip {number} of {folder}"))
    note = HOW_PREDICTED[recipe.objective.name]
    if recipe.objective.normalize_targets:
        note += (
            " Targets are normalised per cube, so mean and contrast of each cube are taken from "
            "the original: the structure inside the cubes is what the model predicts."
        )
    return report.section("Predictions", note, figures)


if __name__ == "__main__":
    sys.exit(main())
