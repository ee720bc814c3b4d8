"""The specification of a task, and the table of all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arvideo_ds.config import Recipe
from arvideo_ds.errors import UserError
from arvideo_ds.planning.plan import RunPlan
from arvideo_ds.registry import Registry
from arvideo_ds.shards.manifest import MANIFEST, ClassNames, ShardSet
from arvideo_ds.shards.synthetic_sets import set_of

# Every module keeps its model as `model`, so its weights have this prefix in the module's state.
PREFIX = "model."


class Task(ABC):
    """What a run does that depends on its task, from the first check to the validation.

    Methods that need torch import it themselves. Where a default reads `recipe.evaluation`, recipes
    without that section override it.
    """

    # The metric under validation/ whose highest value chooses the best weights, and others that are
    # recorded with it; None chooses none.
    best_by: str | None = None
    recorded: tuple[str, ...] = ()
    # The learning rate of layer i of n is that of the head x layer_decay^(n + 1 - i).
    layer_decay: float = 1.0
    # Of the moving average of the weights; None keeps none.
    ema_decay: float | None = None

    def __init__(self, recipe: Any) -> None:
        self.recipe = recipe

    # Before the start.

    def settled(self, folder: Path) -> Any:  # noqa: ARG002
        """The recipe with all choices made that depend on other files. folder: of the run."""
        return self.recipe

    def evaluation_shards(self) -> list[str | None]:
        """Shards that the run reads beside those that it trains on."""
        return [self.recipe.evaluation.shards]

    def open_validation(self) -> ShardSet | None:
        """The shards of the validation while training. Errors: `UserError`."""
        return open_shards(self.recipe.evaluation.shards)

    @property
    def every_epochs(self) -> float:
        """Epochs between validations."""
        return float(self.recipe.evaluation.every_epochs)

    @abstractmethod
    def check(self, plan: RunPlan, shards: ShardSet | None, validation: ShardSet | None) -> None:
        """Errors: `UserError` where recipe, plan and shards contradict each other."""

    def sets_to_make(self) -> list[str]:
        """Synthetic sets whose shards a start makes where they are missing.

        Those that the run reads, if it trains on one. None where it needs scores of its tokens,
        which are made of the shards in between.
        """
        train = self.recipe.data.shards
        if self.recipe.needs_scores or set_of(train) is None:
            return []
        sets = map(set_of, [train, *self.evaluation_shards()])
        return list(dict.fromkeys(name for name in sets if name is not None))

    def will_be_made(self, where: str | None) -> bool:
        return set_of(where) in self.sets_to_make()

    def require_validation(self, validation: ShardSet | None) -> None:
        """Errors: `UserError` where evaluation.shards are given and missing."""
        where = self.recipe.evaluation.shards
        if where is not None and validation is None and not self.will_be_made(where):
            raise UserError(
                f"evaluation.shards={where} holds no shards (no {MANIFEST}). Make them with "
                "`arvideo shards`, or leave the key out."
            )

    # Words of the header and of a logged step.

    @abstractmethod
    def model_words(self) -> str:
        """The model, without its numbers of parameters."""

    @abstractmethod
    def token_words(self, plan: RunPlan) -> str:
        """What becomes of a clip's tokens, to follow the grid: begins with its separator."""

    @abstractmethod
    def metric_words(self, metrics: Mapping[str, Any]) -> str:
        """What the validation measured, by names without their prefix."""

    # Training.

    @abstractmethod
    def build(self, shards: ShardSet) -> Any:
        """The `nn.Module` that is trained, initialised from torch's global generator.

        It takes a batch and returns the loss while training, else what the validation asks for. A
        method `baseline`, where it has one, is measured once (train/baseline.py).
        """

    def initialize(self, module: Any, shards: ShardSet) -> str | None:  # noqa: ARG002
        """Load the weights to begin with, where the recipe names some; a report of it."""
        return None

    def clips(self) -> dict[str, Any]:
        """`clips` and `together` of the `TrainLoader`, where they are not clips of videos alone."""
        return {}

    def labels(self, shards: ShardSet) -> ClassNames | None:  # noqa: ARG002
        """Names of the outputs, kept with the run; None where they have none."""
        return None

    @abstractmethod
    def validation(self, shards: ShardSet) -> Any:
        """What measures the model on these shards: `(predict, *, num_workers, device)` to metrics.

        predict: a batch to the module's output, not training. Metrics by name, without their prefix
        validation/. Collective.
        """


def open_shards(where: str | None) -> ShardSet | None:
    """The shards, where they are there already."""
    if where is None or not ("://" in where or (Path(where) / MANIFEST).exists()):
        return None
    return ShardSet(where)


# A specification for each task, by the value of `task`; recipes are in config.RECIPES.
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
    """The task of a recipe."""
    return TASKS.choose(recipe.task, key="task")(recipe)
