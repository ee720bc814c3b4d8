"""What all ranks verify before a run starts: its data, and the checkpoint that it resumes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from arvideo_ds.engine.agreement import gather_texts
from arvideo_ds.engine.checkpoints import Checkpoint, newest_sound_checkpoint
from arvideo_ds.engine.world import World
from arvideo_ds.errors import UserError
from arvideo_ds.long_video.score_store import TokenScores, hash_of_scores
from arvideo_ds.runs import run_folder
from arvideo_ds.shards.manifest import ShardSet
from arvideo_ds.train.settle import Options, Settings

# How long the indices of a shard set are compared with the manifest before a run begins.
_CHECK_S = 120


def check_data(settings: Settings[Any], shards: ShardSet, world: World) -> None:
    """Compare the shards with their manifests: one rank of each machine does, all raise its error.

    Behind a URL they are the same for all machines. Collective. Errors: `UserError`, on every rank.
    """
    sets = [each for each in (shards, settings.validation) if each is not None]
    error = ""
    try:
        for each in sets:
            if world.is_main if each.is_remote else world.local_rank == 0:
                checked, total = each.check(limit_s=_CHECK_S), len(each.manifest.shards)
                if checked < total and world.is_main:
                    print(
                        f"note: {checked} of {total} indices of {each.name} are what the manifest "
                        f"says; the others are checked when they are read ({_CHECK_S} s are over).",
                        flush=True,
                    )
        if world.local_rank == 0 and settings.recipe.data.scores is not None:
            TokenScores(settings.recipe.data.scores).check_sizes()
    except UserError as found:
        error = str(found)
    if error := next(filter(None, gather_texts(error)), ""):
        raise UserError(error)


def find_checkpoint(
    options: Options, settings: Settings[Any], shards: ShardSet
) -> Checkpoint | None:
    """What to resume from: the run's own newest checkpoint, else that of --resume, else None.

    Collective: the ranks share the work of verifying it.
    """
    own = newest_sound_checkpoint(options.folder / run_folder.CHECKPOINTS, own=True)
    if own is None and options.resume is None:
        return None
    found = own
    if found is None:
        parent = Path(options.resume or "")
        found = newest_sound_checkpoint(parent / run_folder.CHECKPOINTS, own=False)
    if found is None:
        raise UserError(f"--resume {options.resume}: that run holds no complete checkpoint.")
    if found.facts.get("manifest") != shards.hash:
        raise UserError(
            f"checkpoint {found.path} was trained on other shards than {shards.name}: the "
            "manifest differs, so its position in the data means nothing here. Point data.shards "
            "at the shards it was started with, or start another run with another --output."
        )
    recipe = settings.recipe
    if own is not None:
        run_folder.require_same_rates(own.path, own.facts.get("plan"), settings.plan)
    if own is not None and found.facts.get("scores") != hash_of_scores(recipe):
        raise UserError(
            f"checkpoint {found.path} was trained with other token scores than data.scores="
            f"{recipe.data.scores}: scores.json differs. Point data.scores at those, or start "
            "another run with another --output."
        )
    return found
