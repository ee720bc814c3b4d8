"""The online probe: judged while pretraining as afterwards, at every stage, without any effect."""

from __future__ import annotations

from pathlib import Path

import pytest

from arvideo_ds.config import PretrainRecipe, load_recipe
from arvideo_ds.errors import UserError
from arvideo_ds.evaluation.features import freeze
from arvideo_ds.evaluation.pretrained import build_objective, with_weights
from arvideo_ds.evaluation.probes import PROBES
from arvideo_ds.shards.manifest import ShardSet
from arvideo_ds.train.settle import RunOptions, settle
from tests.conftest import ROOT
from tests.train.conftest import Runs


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "ranks"), [("zero0", 1), ("zero3", 2)])
def test_it_says_what_the_probe_says_afterwards_and_changes_nothing(
    stage: str, ranks: int, runs: Runs, demo_shards: Path
) -> None:
    probe = (
        f"probe.train_shards={demo_shards / 'train'}",
        f"probe.test_shards={demo_shards / 'test'}",
    )
    name = f"probed-{stage}"
    options = ("train.max_steps=6", *probe)
    runs.run(name, *options, "probe.every_epochs=0.25", ranks=ranks, stage=stage)
    runs.run(f"un{name}", *options, ranks=ranks, stage=stage)
    assert runs.losses(name) == runs.losses(f"un{name}")
    judged = {m["step"]: m["validation/knn"] for m in runs.metrics(name) if "validation/knn" in m}
    # 48 videos, 8 clips of 2 repeats: 4 videos a step, so every 3 steps.
    assert list(judged) == [3, 6]
    recipe = load_recipe(str(runs.folder / name / "recipe.yaml"))
    encoder = with_weights(
        build_objective(recipe), runs.folder / name / "model.safetensors"
    ).encoder
    frozen = freeze(
        encoder, recipe, *(ShardSet(demo_shards / split) for split in ("train", "test"))
    )
    assert judged[6] == pytest.approx(100 * PROBES["knn"]().accuracy(frozen), abs=2.1)
    assert not (runs.folder / name / "best.safetensors").exists()


@pytest.mark.parametrize("missing", ["train", "test"])
def test_shards_that_are_not_there_are_said_before_anything_starts(
    missing: str, demo_shards: Path, tmp_path: Path
) -> None:
    shards = {split: str(demo_shards / split) for split in ("train", "test")}
    shards[missing] = str(tmp_path / "nowhere")
    overrides = [f"probe.{split}_shards={folder}" for split, folder in shards.items()]
    options = RunOptions(
        "demo",
        ROOT / "ds_configs/zero1.json",
        [f"data.shards={demo_shards / 'train'}", *overrides, "probe.every_epochs=1"],
    )
    with pytest.raises(UserError, match=r"probe\.every_epochs=1 needs labelled shards"):
        settle(options, PretrainRecipe, world_size=1)


def test_features_that_are_not_known_are_refused_before_anything_starts(demo_shards: Path) -> None:
    options = RunOptions(
        "demo",
        ROOT / "ds_configs/zero1.json",
        [f"data.shards={demo_shards / 'train'}", "probe.features=chnage"],
    )
    with pytest.raises(UserError, match=r"probe\.features=chnage is not .* Did you mean 'change'"):
        settle(options, PretrainRecipe, world_size=1)
