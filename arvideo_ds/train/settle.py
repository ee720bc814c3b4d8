"""Everything that is decided before the first process talks to another; needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

from arvideo_ds.config import (
    DetectRecipe,
    FinetuneRecipe,
    PretrainRecipe,
    Recipe,
    TokenizerRecipe,
    load_recipe,
)
from arvideo_ds.config.load import AnyRecipe
from arvideo_ds.config.objectives import LvmaeSettings
from arvideo_ds.engine.resolve import read_deepspeed_json, resolve, sequence_parallel
from arvideo_ds.errors import UserError
from arvideo_ds.evaluation.probes import POOLINGS
from arvideo_ds.long_video.score_store import TokenScores
from arvideo_ds.planning.plan import RunPlan, make_plan
from arvideo_ds.runs import run_folder
from arvideo_ds.shards.manifest import MANIFEST, ShardSet, require_same_labels
from arvideo_ds.shards.synthetic_sets import how_to_make, set_of
from arvideo_ds.shards.video_files import how_to_make_shards
from arvideo_ds.train.transfer import settle_transfer

_BOX_FILES = ("annotations", "detections", "excluded", "action_list")


@dataclass(frozen=True)
class Options:
    """The command line of a training run."""

    recipe: str
    deepspeed_config: Path
    overrides: Sequence[str] = ()
    output: Path | None = None
    resume: Path | None = None

    @property
    def folder(self) -> Path:
        return self.output or Path("runs") / Path(self.recipe).stem


@dataclass(frozen=True)
class Settings(Generic[AnyRecipe]):
    """A run, decided: `--dry_run` prints it."""

    recipe: AnyRecipe
    plan: RunPlan
    deepspeed: dict[str, Any]
    shards: ShardSet | None
    # What a run is judged on while it trains.
    validation: ShardSet | None = None

    def require_shards(self) -> ShardSet:
        """The shards. Errors: `UserError` with the command that makes them."""
        return _require(self.recipe, self.shards)

    def as_dict(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "plan": self.plan.as_dict(),
            "deepspeed": self.deepspeed,
        }


def settle(options: Options, kind: type[AnyRecipe], *, world_size: int) -> Settings[AnyRecipe]:
    """Recipe (of `kind`), plan and DeepSpeed configuration, resolved against each other.

    Missing shards are no error yet (a dry run needs none): the plan then counts with
    data.num_videos. Errors: `UserError`.
    """
    recipe = load_recipe(options.recipe, options.overrides, kind)
    _ = recipe.wandb.settled()  # an error in the environment ends a run before it starts
    run_folder.require_own(options.folder, run_folder.RECIPE)
    recipe = settle_transfer(recipe, options.folder)
    # Afterwards the run's own checkpoints count (run.py), and so does its own recipe.
    if options.resume is not None and not run_folder.has_checkpoints(options.folder):
        run_folder.require_resumable(options.resume, recipe)
    shards = _open(recipe.data.shards)
    if shards is None and recipe.data.num_videos is None:
        _require(recipe, shards)
    if shards is not None:
        _check_scores(recipe, shards)
    tree, origin = read_deepspeed_json(options.deepspeed_config), str(options.deepspeed_config)
    plan = make_plan(
        recipe,
        world_size=world_size,
        num_videos=None if shards is None else shards.num_samples,
        sequence_parallel=sequence_parallel(tree, origin),
    )
    config = resolve(tree, recipe, plan, origin)
    validation = None
    if isinstance(recipe, PretrainRecipe):
        validation = _probe_shards(recipe)
    elif isinstance(recipe, FinetuneRecipe):
        validation = _open(recipe.evaluation.shards)
        _check_labels(recipe, plan, shards, validation)
    elif isinstance(recipe, DetectRecipe):
        validation = _open(recipe.evaluation.shards)
        _check_boxes(recipe, shards, validation)
    elif isinstance(recipe, TokenizerRecipe):
        validation = _open(recipe.evaluation.shards)
        if shards is not None:
            _require_validation(recipe, validation)
            _check_network(recipe)
    return Settings(recipe, plan, config, shards, validation)


def sets_to_make(recipe: Recipe) -> list[str]:
    """Synthetic sets (shards/synthetic_sets.py) whose shards a start makes where they are missing.

    Those that the run reads, if it trains on one. None where it needs scores of its tokens, which
    are made of the shards in between.
    """
    read = [recipe.data.shards]
    if isinstance(recipe, FinetuneRecipe | DetectRecipe | TokenizerRecipe):
        read.append(recipe.evaluation.shards)
    elif isinstance(recipe, PretrainRecipe):
        if recipe.objective.needs_scores(recipe.decoder):
            return []
        if recipe.probe.every_epochs is not None:
            read += [recipe.probe.train_shards, recipe.probe.test_shards]
    if set_of(recipe.data.shards) is None:
        return []
    return list(dict.fromkeys(name for name in map(set_of, read) if name is not None))


def _will_be_made(recipe: Recipe, where: str | None) -> bool:
    return set_of(where) in sets_to_make(recipe)


def _open(where: str | None) -> ShardSet | None:
    if where is None or not ("://" in where or (Path(where) / MANIFEST).exists()):
        return None
    return ShardSet(where)


def _require(recipe: Recipe, shards: ShardSet | None) -> ShardSet:
    if shards is not None:
        return shards
    where = recipe.data.shards
    if where is None:
        raise UserError(
            f"the recipe names no shards. {how_to_make_shards('SHARDS')}; then add "
            "data.shards=SHARDS to the command."
        )
    name = set_of(where)
    how = how_to_make_shards(where) if name is None else how_to_make(name)
    raise UserError(f"there are no shards in {where}. {how}")


def _check_scores(recipe: Recipe, shards: ShardSet) -> None:
    """Errors: `UserError` where data.scores is not what these clips and this objective need."""
    objective = recipe.objective if isinstance(recipe, PretrainRecipe) else None
    if recipe.data.scores is None:
        if isinstance(recipe, PretrainRecipe) and recipe.objective.needs_scores(recipe.decoder):
            raise UserError(
                f"objective.name={recipe.objective.name} as the recipe sets it needs scores of the "
                f"tokens. Make them: python scripts/score_tokens.py --shards {shards.name} "
                "--scorer tokenizer --tokenizer RUN --recipe RECIPE; then add data.crop=grid "
                f"data.scores={shards.name}/scores/tokenizer."
            )
        return
    scores = TokenScores(recipe.data.scores)
    scores.require(shards, recipe)
    if isinstance(objective, LvmaeSettings) and objective.targets == "latents":
        if scores.spec.levels is None:
            raise UserError(
                f"objective.targets=latents needs a tokenizer's codes, but {scores.name} was made "
                f"by the scorer {scores.spec.scorer}, which has none. Score with --scorer "
                "tokenizer, or set objective.targets: pixels."
            )
        if scores.spec.levels != objective.latent_levels:
            raise UserError(
                f"objective.latent_levels={list(objective.latent_levels)}, but the tokenizer of "
                f"{scores.name} has {list(scores.spec.levels)}. Set objective.latent_levels to "
                "those."
            )


def _probe_shards(recipe: PretrainRecipe) -> ShardSet | None:
    """What the online probe asks about. Errors: `UserError` where its shards do not go together."""
    POOLINGS.check(recipe.probe.features, key="probe.features")
    if recipe.probe.every_epochs is None:
        return None
    known, asked = _open(recipe.probe.train_shards), _open(recipe.probe.test_shards)
    if known is None or asked is None:
        if _will_be_made(recipe, recipe.probe.train_shards) and _will_be_made(
            recipe, recipe.probe.test_shards
        ):
            return None
        raise UserError(
            f"probe.every_epochs={recipe.probe.every_epochs:g} needs labelled shards in "
            f"probe.train_shards ({recipe.probe.train_shards}) and probe.test_shards "
            f"({recipe.probe.test_shards}). Make them, or leave probe.every_epochs out."
        )
    if known.manifest.labels is None:
        raise UserError(f"{known.name} has no labels; a probe needs class folders or a CSV.")
    require_same_labels(known.name, known.manifest.labels, asked.name, asked.manifest.labels)
    return asked


def _check_labels(
    recipe: FinetuneRecipe, plan: RunPlan, shards: ShardSet | None, validation: ShardSet | None
) -> None:
    """Errors: `UserError` where the classes of recipe, shards and validation differ."""
    settings = recipe.finetune
    if plan.micro_batch % 2 and settings.mixes:
        raise UserError(
            f"finetune.mixup and finetune.cutmix mix the clips of a micro-batch in pairs, but it "
            f"holds {plan.micro_batch}. Choose train.total_batch and train.micro_batch so that it "
            "is even, or set both to 0."
        )
    if shards is None:
        return
    labels = shards.manifest.class_names(settings.heads)
    if labels is None:
        raise UserError(
            f"{shards.name} has no labels; fine-tuning needs shards made from class folders, a CSV "
            "with a label column or a labelled data set (docs/datasets.md)."
        )
    if settings.num_classes not in (None, len(labels)):
        raise UserError(
            f"finetune.num_classes={settings.num_classes}, but {shards.name} has {len(labels)} "
            "classes. Leave the key out, or point data.shards at the shards that are meant."
        )
    _require_validation(recipe, validation)
    if validation is not None:
        others = validation.manifest.class_names(settings.heads)
        require_same_labels(shards.name, labels, validation.name, others)


def _check_boxes(
    recipe: DetectRecipe, shards: ShardSet | None, validation: ShardSet | None
) -> None:
    """Errors: `UserError` where files of boxes are not given or not there."""
    _require_validation(recipe, validation)
    for section, files, opened in (
        ("detect", recipe.detect, shards),
        ("evaluation", recipe.evaluation, validation),
    ):
        if opened is not None and files.annotations is None:
            raise UserError(
                f"{section}.annotations is not given: the file of boxes that {opened.name} was "
                "made from, such as ava_train_v2.2.csv."
            )
        for key, value in files:
            if key in _BOX_FILES and value is not None and not Path(value).is_file():
                raise UserError(f"{section}.{key}={value}: there is no such file.")


def _check_network(recipe: TokenizerRecipe) -> None:
    """Errors: `UserError` where the perceptual loss' weights are not there."""
    network = recipe.tokenizer.perceptual_network
    if network is not None and not Path(network).is_file():
        raise UserError(f"tokenizer.perceptual_network={network}: there is no such file.")


def _require_validation(
    recipe: FinetuneRecipe | DetectRecipe | TokenizerRecipe, validation: ShardSet | None
) -> None:
    where = recipe.evaluation.shards
    if where is not None and validation is None and not _will_be_made(recipe, where):
        raise UserError(
            f"evaluation.shards={where} holds no shards (no {MANIFEST}). Make them with "
            "data_tools/make_shards.py, or leave the key out."
        )
