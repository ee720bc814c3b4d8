"""The model card: the model, its training data and results, and how to open it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import yaml

from arvideo_ds.exports import UNSPECIFIED
from arvideo_ds.exports.source import ExportSource, OpenedExport, public_recipe

# Keys of the summary that are not results.
_NO_RESULTS = re.compile(
    r"(recipe|manifest|plan|commit|interrupted|resumed_from_step|train_seconds)|"
    r".*(throughput|time|memory|data)/"
)
_NO_LICENSE = (
    "## Licence\n\nNot chosen yet: whoever publishes the weights chooses it, within the terms of "
    "the training data (`license` above, `--license` of the export)."
)


def model_card(
    source: ExportSource,
    name: str,
    opened: OpenedExport,
    parity: Mapping[str, Any],
    *,
    license_id: str = UNSPECIFIED,
) -> str:
    """README.md of an exported folder: Markdown with the front matter of model hubs.

    name: of the folder. license_id: of the weights. Numbers are from the run's summary.json and
    parity.json.
    """
    parts = [
        _front_matter(source, name, opened, license_id),
        f"# {name}",
        _what_it_is(source),
        f"## How to open it\n\n```python\n{opened.how_to.replace('FOLDER', name)}\n```",
        *(remark.replace("FOLDER", name) for remark in opened.remarks),
        "## Results\n\n" + _table(("result", "value"), _results(source.summary)),
        "## Parity\n\nLargest difference from the model as it was trained, on "
        f"{parity['clips']}:\n\n"
        + _table(
            ("output", "difference", "largest value"),
            [
                (output, f"{difference:.2e}", f"{parity['largest_value'][output]:.3g}")
                for output, difference in parity["max_abs_difference"].items()
            ],
        ),
        _NO_LICENSE if license_id == UNSPECIFIED else "",
        "## Origin\n\n" + _table(("", ""), _origin(source, opened)),
        "## Recipe\n\n```yaml\n"
        + yaml.safe_dump(public_recipe(source.recipe), sort_keys=False)
        + "```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(source: ExportSource, name: str, opened: OpenedExport, license_id: str) -> str:
    shards, results = source.recipe.data.folders, _model_index(source)
    front: dict[str, Any] = {
        "license": license_id,
        **opened.tags,
        **({"datasets": [PurePath(folder).name for folder in shards]} if shards else {}),
        "tags": ["arvideo_ds", "video", f"ViT-{source.recipe.model.size}"],
        **({"model-index": [{"name": name, "results": results}]} if results else {}),
    }
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---"


def _model_index(source: ExportSource) -> list[dict[str, Any]]:
    """Results of the exported weights: tests of a classifier, named probes of an encoder."""
    results = []
    stem = PurePath(source.weights).stem
    weights = "last" if stem == "model" else stem
    for key, value in source.summary.items():
        # test_<shards>-<weights>-<views>, as `arvideo evaluate` writes it.
        tested = isinstance(value, Mapping) and key.startswith("test_")
        if tested and value.get("weights") == weights:
            views = "x".join(map(str, value["views"]))
            metrics = {f"top-{k} accuracy, %, {views} views": value[f"top{k}"] for k in (1, 5)}
            results.append(_result(key.removeprefix("test_").rsplit("-", 2)[0], metrics))
    if source.labels is None:
        for name, probe in (source.summary.get("probes") or {}).items():
            accuracy = {"linear probe accuracy, %": 100 * probe["linear_probe_accuracy"]}
            results.append(_result(name, accuracy))
    return results


def _result(dataset: str, metrics: Mapping[str, float]) -> dict[str, Any]:
    return {
        "task": {"type": "video-classification"},
        "dataset": {"type": dataset, "name": dataset},
        "metrics": [
            {"type": "accuracy", "value": round(value, 4), "name": name}
            for name, value in metrics.items()
        ],
    }


def _what_it_is(source: ExportSource) -> str:
    parameters = sum(p.numel() for p in source.model.parameters()) / 1e6
    clip = " x ".join(str(n) for n in source.recipe.geometry.clip)
    origin = "trained with arvideo_ds"
    if source.public is not None:
        layout = source.public.report.layout
        origin = f"converted by arvideo_ds from {source.public.path.name} ({layout})"
    what = "video encoder"
    if source.labels is not None:
        counts = source.class_counts.items()
        classes = " and ".join(f"{count} {name} classes" for name, count in counts)
        what = f"classifier of {classes.replace('  ', ' ')}"
    return (
        f"A {what}, ViT-{source.recipe.model.size} ({parameters:.1f} M parameters), for clips of "
        f"{clip} (frames, rows, columns), {origin}."
    )


def _results(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Numbers of the run's summary."""
    flat: dict[str, Any] = {}
    for key, value in summary.items():
        parts = value.items() if isinstance(value, Mapping) else [("", value)]
        flat |= {f"{key}: {name}".removesuffix(": "): part for name, part in parts}
    rows = [
        (key, f"{value:.6g}")
        for key, value in flat.items()
        if not _NO_RESULTS.match(key) and type(value) in (int, float)
    ]
    return rows or [("none written down", "")]


def _origin(source: ExportSource, opened: OpenedExport) -> list[tuple[str, str]]:
    facts = {**source.run, **source.summary}
    return [
        ("recipe", PurePath(str(source.summary.get("recipe", "unknown"))).name),
        ("data (hash of the manifest)", str(facts.get("manifest", "unknown"))),
        ("weights", source.weights),
        ("commit", str(facts.get("commit", "unknown"))),
        ("trained with", in_words(source.run.get("versions") or {}) or "unknown"),
        ("exported with", in_words(opened.versions)),
    ]


def in_words(versions: Mapping[str, Any]) -> str:
    return ", ".join(f"{package} {version}" for package, version in versions.items())


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
