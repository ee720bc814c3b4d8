"""What all ranks verify before a run starts: its data, and the checkpoint that it resumes from."""

from __future__ import annotations

from typing import Any

from arvideo_ds.engine.agreement import gather_objects
from arvideo_ds.engine.checkpoints import Checkpoint, newest_sound_checkpoint
from arvideo_ds.engine.world import World
from arvideo_ds.errors import UserError
from arvideo_ds.long_video.score_store import TokenScores, hash_of_scores
from arvideo_ds.runs import run_folder
from arvideo_ds.shards.mix import AnyShards
from arvideo_ds.tasks.teacher import TEACHER, teacher_facts
from arvideo_ds.train.settle import RunSettings

# Limit of the comparison of a shard set's indices with its manifest.
_CHECK_S = 120


def check_data(settings: RunSettings[Any], world: World) -> None:
    """Compare the shards with their manifests: one rank per machine, of remote shards one in all.

    Collective. Errors: `UserError`, on every rank.
    """
    error = ""
    try:
        opened: list[AnyShards | None] = [settings.shards, settings.validation]
        for shards in (part for each in opened if each is not None for part in each.sets):
            if world.is_main if shards.is_remote else world.local_rank == 0:
                checked, total = shards.check(limit_s=_CHECK_S), len(shards.manifest.shards)
                if checked < total and world.is_main:
                    print(
                        f"note: {checked} of {total} indices of {shards.name} match the manifest; "
                        f"the rest is checked on reading (the check ended after {_CHECK_S} s).",
                        flush=True,
                    )
        if world.local_rank == 0 and settings.recipe.data.scores is not None:
            TokenScores(settings.recipe.data.scores).check_sizes()
    except UserError as raised:
        error = str(raised)
    if error := next(filter(None, gather_objects(error)), ""):
        raise UserError(error)


def find_checkpoint(settings: RunSettings[Any]) -> Checkpoint | None:
    """The run's own newest checkpoint, else that of --resume, else None. Collective.

    Errors: `UserError` for another teacher, other shards, token scores or learning rates than those
    of the run.
    """
    recipe, shards, parent = settings.recipe, settings.require_shards(), settings.options.resume
    own = newest_sound_checkpoint(settings.folder / run_folder.CHECKPOINTS, own=True)
    checkpoint = own
    if own is None:
        if parent is None:
            return None
        checkpoint = newest_sound_checkpoint(parent / run_folder.CHECKPOINTS, own=False)
    if checkpoint is None:
        raise UserError(f"--resume {parent}: that run has no complete checkpoint.")
    if checkpoint.facts.get("manifest") != shards.hash:
        key, what = "shards", "the manifest differs"
        if recipe.data.sources is not None:
            key, what = "sources", "a manifest, a weight or the order of the sources differs"
        raise UserError(
            f"checkpoint {checkpoint.path} was trained on other shards than {shards.name}: "
            f"{what}, so its position in the data means nothing here. Point data.{key} "
            "at the shards it was started with, or start another run with another --output."
        )
    _require_same_teacher(checkpoint, teacher_facts(recipe))
    if own is not None:
        run_folder.require_same_rates(own.path, own.facts.get("plan"), settings.plan)
        if own.facts.get("scores") != hash_of_scores(recipe):
            raise UserError(
                f"checkpoint {own.path} was trained with other token scores than data.scores="
                f"{recipe.data.scores}: scores.json differs. Point data.scores at those, or start "
                "another run with another --output."
            )
    return checkpoint


def _require_same_teacher(checkpoint: Checkpoint, now: dict[str, Any]) -> None:
    was = checkpoint.facts.get(TEACHER, {})
    if was.get("sha256") != now.get(TEACHER, {}).get("sha256"):
        raise UserError(
            f"checkpoint {checkpoint.path} was trained with another teacher ({was.get('origin')}): "
            "the hash of its weights differs. Point objective.teacher (finetune.teacher in "
            "fine-tuning) at it, or start another run with another --output."
        )
