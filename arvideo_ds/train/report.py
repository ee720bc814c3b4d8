"""The report of a pretraining run: report.html with its loss, probes and predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from arvideo_ds.config import PretrainRecipe
from arvideo_ds.config.load import validate
from arvideo_ds.data.clips import EvaluationClips
from arvideo_ds.errors import UserError
from arvideo_ds.evaluation import pictures, report
from arvideo_ds.evaluation.pretrained import build_objective, with_weights
from arvideo_ds.evaluation.probes import POOLINGS, description, probe_names
from arvideo_ds.files.locks import make_folder
from arvideo_ds.randomness import draw_key
from arvideo_ds.runs import run_folder
from arvideo_ds.shards.manifest import ShardSet
from arvideo_ds.train.baseline import BASELINE
from arvideo_ds.train.lineage import curve, parents
from arvideo_ds.train.record import BELOW_BASELINE, not_below

HOW_PREDICTED = {
    "arvideo": (
        "Each step predicts one more cluster (outlined) from the encoded tokens of the clusters "
        "before it in the sampled order; the first cluster is given. Predictions accumulate in the "
        "picture and are not fed back."
    ),
    "videomae": "The hidden tokens are predicted at once from the visible ones.",
    "lvmae": "The chosen tokens are predicted at once from the visible ones.",
}


def write_report(
    run: Path,
    recipe: PretrainRecipe,
    shards: str | None,
    clips: int,
    *,
    steps: int = pictures.MAX_STEPS,
    pictures_to: Path | None = None,
) -> Path:
    """Write RUN/report.html; its path. shards: of the clips to show, by default the recipe's.

    steps: of each prediction to show, from the first to the last. pictures_to: a folder in which
    the pictures are written as PNG files too.

    Errors: `UserError` where the run has no metrics or no summary, there are no clips to show, or
    `pictures_to` cannot be made.
    """
    if not run_folder.read_metrics(run):
        raise UserError(f"{run} has no metrics yet; train it first.")
    summary = run_folder.read_summary(run)
    if pictures_to is not None:
        make_folder(pictures_to)
    sections = [loss(run, summary), *probes(summary)]
    sections.append(predictions(run, recipe, shards, clips, steps))
    path = run / "report.html"
    parts = [report.table(facts(run, recipe, summary)), *(section.html() for section in sections)]
    report.write_page(path, f"arvideo_ds: {run.name}", parts)
    if pictures_to is not None:
        for section in sections:
            section.save(pictures_to)
    return path


def facts(run: Path, recipe: PretrainRecipe, summary: dict[str, Any]) -> list[tuple[str, Any]]:
    plan = summary["plan"]
    chain = [f"{parent.name} from step {step}" for parent, step in parents(run)]
    millions = plan["parameters_encoder"] / 1e6
    return [
        *([("continues", ", which continues ".join(chain))] if chain else []),
        ("objective", ", ".join(f"{k} {v}" for k, v in _objective(recipe).items())),
        ("encoder", f"ViT-{recipe.model.size}, {millions:.1f} M parameters"),
        ("clip", " x ".join(map(str, plan["clip_shape"]))),
        *((f"phase {n}", _phase(phase)) for n, phase in enumerate(plan.get("phases", ()), 1)),
        ("clusters", f"{plan['num_clusters']} of {plan['cluster_size']} tokens"),
        ("encoded / predicted tokens", f"{plan['encoder_tokens']} / {plan['decoder_queries']}"),
        ("steps", f"{summary['steps']} of {plan['total_batch']} clips"),
        ("last start took", f"{summary['train_seconds_of_last_start'] / 60:.1f} min"),
        ("commit", summary["commit"]),
    ]


def _objective(recipe: PretrainRecipe) -> dict[str, Any]:
    return recipe.objective.model_dump(exclude_none=True)


def _phase(phase: dict[str, Any]) -> str:
    clip = " x ".join(map(str, phase["plan"]["clip_shape"]))
    return f"to step {phase['end_step']}: clip {clip}, {phase['plan']['total_batch']} clips a step"


def loss(run: Path, summary: dict[str, Any]) -> report.Section:
    """The curve of the run and of the runs that it continues."""
    notes, continued, baseline = ["Mean over all ranks."], parents(run), summary.get(BASELINE)
    if baseline is not None:
        notes.append(
            "Dotted: the loss of predicting the mean of the targets without seeing the clip, "
            "measured on the first batch."
        )
    if summary.get(BELOW_BASELINE) is False:
        notes.append(f"Note: {not_below(summary['final']['loss/pretrain'], baseline)}")
    for parent, step in continued[-1:]:
        if not run_folder.read_metrics(parent):
            notes.append(
                f"Steps 1 to {step} are not drawn: there are no metrics of the run that was "
                f"continued, {parent.name}."
            )
    joins = [(step, parent.name) for parent, step in reversed(continued)]
    figure = pictures.draw_loss(curve(run), baseline=baseline, joins=joins)
    return report.Section("Loss", " ".join(notes), [figure])


def probes(summary: dict[str, Any]) -> list[report.Section]:
    """A section for the recipe's shards, and for each set that `arvideo probe` was given."""
    results = {"Probes": summary} if probe_names(summary) else {}
    results |= {f"Probes: {name}": result for name, result in summary.get("probes", {}).items()}
    sections = []
    for title, result in results.items():
        clips, name = result.get("probe_clips", 1), result["probe_features"]
        where = "the central clip" if clips == 1 else f"{clips} clips"
        what = description(POOLINGS[name]) if name in POOLINGS else f"features '{name}'"
        note = (
            f"Frozen encoder, {what} of {where} of each test video; an attentive probe sees all "
            "tokens. Untrained: the same encoder with random weights."
        )
        sections.append(report.Section(title, note, [pictures.draw_probes(result)]))
    return sections


def predictions(
    run: Path,
    recipe: PretrainRecipe,
    shards: str | None,
    count: int,
    steps: int = pictures.MAX_STEPS,
) -> report.Section:
    if recipe.objective.needs_scores(recipe.decoder):
        note = "Not drawn: predictions depend on data.scores, which only training reads."
        return report.Section("Predictions", note)
    if recipe.objective.teacher is not None:
        note = "Not drawn: the model predicts the features of its teacher instead of pixels."
        return report.Section("Predictions", note)
    folder = shards or recipe.probe.test_shards or next(iter(recipe.data.folders), None)
    if folder is None:
        raise UserError("the recipe names no shards to show clips of; give --shards SHARDS.")
    # The picture shows every token predicted, whatever share the loss was computed on.
    tree = recipe.model_dump()
    tree["decoder"] |= {"target_ratio": 1.0, "target_rule": "random"}
    model = with_weights(build_objective(validate(tree, "recipe")), run / run_folder.MODEL)
    clips = EvaluationClips(ShardSet(folder), recipe)
    figures = []
    for number in range(min(count, len(clips))):
        key = draw_key(recipe.train.seed, 0, number, 0)
        prediction = pictures.predict_clip(model, clips[number].clips[0], key, recipe)
        title = f"clip {number} of {folder}"
        figures.append(pictures.draw_prediction(prediction, title, steps=steps))
    note = HOW_PREDICTED[recipe.objective.name]
    if recipe.objective.normalize_targets:
        note += (
            " Targets are normalised per cube, so mean and contrast of each cube are taken from "
            "the original: the structure inside the cubes is what the model predicts."
        )
    return report.Section("Predictions", note, figures)
