"""Shards are compared with their manifests by one rank of a machine, and every rank hears of it."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from arvideo_ds.config import PretrainRecipe
from arvideo_ds.engine.world import World
from arvideo_ds.errors import UserError
from arvideo_ds.planning.plan import make_plan
from arvideo_ds.shards.manifest import ShardSet
from arvideo_ds.train import preflight
from arvideo_ds.train.settle import RunOptions, RunSettings

WORLD = World(0, 4, 0, 2, torch.device("cpu"), "srun", 1)


def test_one_rank_of_a_machine_checks_and_all_raise_what_it_found(
    textured_shards: Path,
    tiny: Callable[..., PretrainRecipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = shutil.copytree(textured_shards, tmp_path / "shards")
    recipe, shards = tiny(), ShardSet(folder)
    plan = make_plan(recipe, world_size=1, num_videos=9)
    settings = RunSettings(RunOptions("tiny", tmp_path), recipe, plan, {}, 0, shards, shards)
    (folder / shards.manifest.shards[2].index_name).unlink()
    checked, heard = [], ["", "", "", ""]
    check = ShardSet.check

    def noted(self: ShardSet, *, limit_s: float) -> int:
        checked.append(rank)
        return check(self, limit_s=limit_s)

    def gather(verdict: str) -> list[str]:
        heard[rank] = verdict
        return heard

    monkeypatch.setattr(ShardSet, "check", noted)
    monkeypatch.setattr(preflight, "gather_objects", gather)
    for rank in range(4):  # ranks 0 and 2 are the first of their machines
        world = dataclasses.replace(WORLD, rank=rank, local_rank=rank % 2)
        with pytest.raises(UserError, match=shards.manifest.shards[2].index_name):
            preflight.check_data(settings, world)
    assert checked == [0, 2]
    assert [bool(verdict) for verdict in heard] == [True, False, True, False]
