"""Tables of the probes of a frozen encoder and of the features that they read; needs no torch.

Plugins add to both: docs/features.md has an example.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from arvideo_ds.config.pretrain import ProbeSettings
from arvideo_ds.errors import UserError
from arvideo_ds.registry import Registry
from arvideo_ds.shards.manifest import ShardSet, require_same_labels

if TYPE_CHECKING:
    from arvideo_ds.evaluation.features import FrozenEncoder


class Probe(ABC):
    """Constructed without arguments; described by the first line of its docstring.

    label: its name in tables and pictures.
    """

    label: ClassVar[str]

    @abstractmethod
    def accuracy(self, frozen: FrozenEncoder) -> float:
        """Share of the test videos that are classified correctly, 0 to 1."""


# The accuracy is NAME_accuracy in summary.json.
PROBES: Registry[type[Probe]] = Registry(
    "probe",
    {
        "linear_probe": "arvideo_ds.evaluation.probing:LinearProbe",
        "knn": "arvideo_ds.evaluation.probing:NearestNeighbours",
        "attentive_probe": "arvideo_ds.evaluation.probing:AttentiveProbe",
    },
)
# Cheap once the features are computed.
DEFAULT_PROBES = ("linear_probe", "knn")
# Tokens B (t s) D and t -> B D', described by the first line of the docstring.
POOLINGS: Registry[Callable[[Any, int], Any]] = Registry(
    "pooling of features",
    {
        name: f"arvideo_ds.evaluation.features:{name}"
        for name in ("mean", "change", "course", "motion")
    },
)


def description(entry: object) -> str:
    """The first line of the docstring of a probe or pooling, for the middle of a sentence."""
    line = (inspect.getdoc(entry) or "").partition("\n")[0].rstrip(".")
    return line[:1].lower() + line[1:]


def probe_names(results: Mapping[str, Any]) -> list[str]:
    """The probes with results in summary.json, or in a data set in it."""
    names = [key.removesuffix("_accuracy") for key in results if key.endswith("_accuracy")]
    return [name for name in names if f"untrained_{name}_accuracy" in results]


def open_probe_shards(
    settings: ProbeSettings, train: str | None = None, test: str | None = None
) -> tuple[ShardSet, ShardSet]:
    """Labelled shards to train and test probes on, by default those of the recipe.

    Errors: `UserError` where the recipe names none, or as `require_probe_labels`.
    """
    train, test = train or settings.train_shards, test or settings.test_shards
    if train is None or test is None:
        raise UserError("the recipe names no probe shards; give --train SHARDS and --test SHARDS.")
    opened = ShardSet(train), ShardSet(test)
    require_probe_labels(*opened)
    return opened


def require_probe_labels(train: ShardSet, test: ShardSet) -> None:
    """Errors: `UserError` where the shards have no labels or different ones."""
    labels = train.manifest.labels
    if labels is None:
        raise UserError(f"{train.name} has no labels; a probe needs class folders or a CSV.")
    require_same_labels(train.name, labels, test.name, test.manifest.labels)
