"""Probing a finished run: its encoder beside the same one before training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arvideo_ds.config import PretrainRecipe
from arvideo_ds.evaluation.features import freeze
from arvideo_ds.evaluation.pretrained import load_trained_encoder, untrained
from arvideo_ds.evaluation.probes import Probe, probe_names
from arvideo_ds.shards.manifest import ShardSet


def probe_run(
    run: Path, recipe: PretrainRecipe, train: ShardSet, test: ShardSet, probes: Mapping[str, Probe]
) -> dict[str, Any]:
    """Facts for summary.json: NAME_accuracy and untrained_NAME_accuracy of each probe, and what
    decides them.
    """
    results: dict[str, Any] = {}
    for prefix, encoder in (
        ("", load_trained_encoder(recipe, run)),
        ("untrained_", untrained(recipe).encoder),
    ):
        frozen = freeze(encoder, recipe, train, test)
        for name, probe in probes.items():
            results[f"{prefix}{name}_accuracy"] = probe.accuracy(frozen)
        results["probe_clips_skipped"] = sum(features.skipped for features in frozen.features)
    return results | {
        "probe_chance_accuracy": round(1 / len(train.manifest.labels or "?"), 4),
        "probe_features": recipe.probe.features,
        "probe_clips": recipe.probe.clips,
        "probe_manifests": [train.hash, test.hash],
    }


def side_by_side(sets: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line per data set, with every probe of the trained encoder and (the untrained one)."""
    lines = []
    for name, results in sets.items():
        cells = [
            f"{probe} {100 * results[f'{probe}_accuracy']:.1f} "
            f"({100 * results[f'untrained_{probe}_accuracy']:.1f})"
            for probe in probe_names(results)
        ]
        lines.append(f"{name}: {', '.join(cells)}; percent, untrained in brackets")
    return lines
