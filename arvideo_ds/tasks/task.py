"""The base class of task specifications, and the table of tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arvideo_ds.config import Recipe
from arvideo_ds.config.schema import DataSettings
from arvideo_ds.errors import UserError
from arvideo_ds.planning.plan import RunPlan
from arvideo_ds.registry import Registry
from arvideo_ds.shards.manifest import MANIFEST, ClassNames, ShardSet
from arvideo_ds.shards.mix import AnyShards, ShardMix
from arvideo_ds.shards.synthetic_sets import set_of

# Prefix of the model's weights in the state of a trained module, whose model is its `model`.
PREFIX = "model."


class Task(ABC):
    """The parts of a run that depend on its task, from the first check to the validation.

    Methods that need torch import it themselves. Recipes without the section `evaluation` override
    the defaults that read it.
    """

    # The metric under validation/ whose highest value chooses the best weights (None: no choice),
    # and others that are recorded with it.
    best_by: str | None = None
    recorded: tuple[str, ...] = ()
    # The learning rate of layer i of n is that of the head x layer_decay^(n + 1 - i).
    layer_decay: float = 1.0

    def __init__(self, recipe: Any) -> None:
        self.recipe = recipe

    def settled(self, folder: Path) -> Any:  # noqa: ARG002
        """The recipe with all choices made that depend on other files. folder: of the run."""
        return self.recipe

    def evaluation_shards(self) -> list[str | None]:
        """Shards that the run reads besides its training shards."""
        return [self.recipe.evaluation.shards]

    def open_validation(self) -> ShardSet | None:
        """Shards of the validation during training. Errors: `UserError`."""
        return open_shards(self.recipe.evaluation.shards)

    @property
    def every_epochs(self) -> float:
        """Epochs between validations."""
        return float(self.recipe.evaluation.every_epochs)

    @abstractmethod
    def check(self, plan: RunPlan, shards: AnyShards | None, validation: ShardSet | None) -> None:
        """Errors: `UserError` where recipe, plan and shards contradict each other."""

    def sets_to_make(self) -> list[str]:
        """Synthetic sets that the run's start makes where they are missing.

        Empty where it trains on other shards, or on token scores, which need the shards first.
        """
        train = self.recipe.data.folders
        if self.recipe.needs_scores or not train or None in map(set_of, train):
            return []
        sets = map(set_of, [*train, *self.evaluation_shards()])
        return list(dict.fromkeys(name for name in sets if name is not None))

    def will_be_made(self, where: str | None) -> bool:
        return set_of(where) in self.sets_to_make()

    def require_validation(self, validation: ShardSet | None) -> None:
        """Errors: `UserError` where evaluation.shards are given and missing."""
        where = self.recipe.evaluation.shards
        if where is not None and validation is None and not self.will_be_made(where):
            raise UserError(
                f"evaluation.shards={where} has no shards (no {MANIFEST}). Make them with "
                "`arvideo shards`, or remove the key."
            )

    @abstractmethod
    def model_words(self) -> str:
        """The model for the run's header, without its parameter counts."""

    @abstractmethod
    def token_words(self, plan: RunPlan) -> str:
        """Use of a clip's tokens; follows the grid in the header, begins with a separator."""

    @abstractmethod
    def metric_words(self, metrics: Mapping[str, Any]) -> str:
        """Text of a validation's metrics, which are named without their prefix."""

    @abstractmethod
    def build(self, shards: AnyShards) -> Any:
        """The `nn.Module` to train, initialised from torch's global generator.

        It takes a batch and returns the loss while training, else the input of the validation. An
        optional method `baseline` is measured once (train/baseline.py); an optional tuple
        `compilable` names the methods that train.compile compiles, else it compiles each layer.
        """

    def check_start(self) -> None:
        """Errors: `UserError` where the initial weights that the recipe names do not exist."""
        return

    def build_words(self, module: Any) -> str | None:
        """What the first rank prints about a module that was built."""
        teacher = getattr(module, "teacher", None)
        return None if teacher is None else f"teacher: {teacher.report}"

    def initialize(self, module: Any, shards: AnyShards) -> str | None:  # noqa: ARG002
        """Load the initial weights that the recipe names; returns a report, None without any."""
        return None

    def freeze(self, module: Any) -> None:  # noqa: B027  most tasks train all weights
        """Freeze weights and add adapters to them, where the recipe says so."""

    def parameter_groups(self, module: Any) -> list[dict[str, Any]] | None:  # noqa: ARG002
        """Groups for the optimiser, with the keys of those of `optim.groups`; None: those."""
        return None

    def exported(self, state: Any, metrics: Mapping[str, Any]) -> Any:  # noqa: ARG002
        """The model's weights as they are exported, from those of a checkpoint.

        metrics: of the checkpoint's step, with its validation.
        """
        return state

    def clips(self) -> dict[str, Any]:
        """Options `clips` and `together` of the `TrainLoader`; empty for plain clips of videos."""
        return {}

    def labels(self, shards: AnyShards) -> ClassNames | None:  # noqa: ARG002
        """Names of the outputs, saved with the run; None where they have none."""
        return None

    @abstractmethod
    def validation(self, shards: ShardSet) -> Any:
        """A function `(predict, *, num_workers, device)` -> metrics of the model on these shards.

        predict: a batch -> the module's output in evaluation mode. Metrics by name, without their
        prefix validation/. Collective.
        """


def open_shards(where: str | None) -> ShardSet | None:
    """The shards, None where they do not exist yet."""
    return ShardSet(where) if where is not None and _exist(where) else None


def open_training_shards(data: DataSettings) -> AnyShards | None:
    """The shards to train on, or the mixture of all sources; None where some do not exist yet."""
    if data.sources is None:
        return open_shards(data.shards)
    return ShardMix(data) if all(map(_exist, data.folders)) else None


def _exist(where: str) -> bool:
    return "://" in where or (Path(where) / MANIFEST).exists()


# By the value of `task`; their recipes are in config.RECIPES.
TASKS: Registry[type[Task]] = Registry(
    "task",
    {
        "pretrain": "arvideo_ds.tasks.specs.pretrain:Pretraining",
        "finetune": "arvideo_ds.tasks.specs.finetune:Finetuning",
        "detect": "arvideo_ds.tasks.specs.detect:Detection",
        "tokenizer": "arvideo_ds.tasks.specs.tokenizer:TokenizerTraining",
    },
)


def task_of(recipe: Recipe) -> Task:
    return TASKS.choose(recipe.task, key="task")(recipe)
