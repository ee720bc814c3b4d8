"""Scorers: how much each token is worth predicting; one interface, a table of names.

A scorer takes consecutive windows of one video and returns a score for every token, larger = more
important, and codes if it has them. The pass gives it one window at a time, since some kernels
round differently in larger batches.

A plugin adds a scorer with `@SCORERS.register("name")`: a class whose constructor takes the size of
a token. Needs no torch, for command lines.

B windows of one video, F frames, H W pixels, t h w tokens of a window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from arvideo_ds.errors import UserError
from arvideo_ds.geometry import Triple
from arvideo_ds.long_video.score_store import WINDOW
from arvideo_ds.registry import Registry

TOKENIZER = "tokenizer"
# Selection rules that need no scores; they were scorers in earlier versions.
_SELECTION_RULES = ("uniform", "random")


@dataclass(frozen=True)
class Piece:
    """Consecutive windows of video `key`: frames B F H W 3 (uint8); first: index of their first."""

    key: str
    first: int
    frames: np.ndarray


@dataclass(frozen=True)
class Scored:
    """Scores B t h w (float32), larger = more important; codes B t h w (int64), if any."""

    scores: np.ndarray
    codes: np.ndarray | None = None


class Scorer(Protocol):
    """A scorer; unless `on_device` it is pickled to the processes that decode.

    settings: everything that determines the scores, except the windows and the tokenizer.
    tokenizer: hash of the tokenizer's weights. levels: of its codes. on_device: whether it runs on
    an accelerator, in the main process.
    """

    @property
    def name(self) -> str: ...
    @property
    def settings(self) -> dict[str, Any]: ...
    @property
    def tokenizer(self) -> str | None: ...
    @property
    def levels(self) -> tuple[int, ...] | None: ...
    @property
    def on_device(self) -> bool: ...
    def __call__(self, piece: Piece) -> Scored: ...


# Called with the size of a token (frames, rows, columns); TOKENIZER also with run and device.
SCORERS: Registry[Callable[..., Scorer]] = Registry(
    "scorer",
    {
        TOKENIZER: "arvideo_ds.long_video.estimators:TokenizerScorer",
        "flow": "arvideo_ds.long_video.estimators:Flow",
        "everest": "arvideo_ds.long_video.estimators:Everest",
    },
)


def scorer_name(name: str) -> str:
    """Check a name of a command line. Errors: `UserError` where no scorer has it."""
    if name in _SELECTION_RULES:
        raise UserError(
            f"--scorer {name}: the rule {name} needs no scores. Remove data.scores and set "
            f"objective.decoder_mask={name} (LVMAE) or decoder.target_rule={name} (ARVideo)."
        )
    SCORERS.check(name, key="--scorer")
    return name


def make_scorer(name: str, patch: Triple, *, tokenizer: str | None, device: str) -> Scorer:
    """The scorer `name` for tokens of size `patch`.

    tokenizer: a run, for the scorer TOKENIZER only. Errors: `UserError` where the scorer does not
    work with the patch, or the tokenizer is missing.
    """
    scorer = SCORERS[scorer_name(name)]
    if (name == TOKENIZER) != (tokenizer is not None):
        raise UserError(
            f"--scorer {name} does not go together with --tokenizer {tokenizer}: --tokenizer RUN "
            f"is for --scorer {TOKENIZER}, which needs it."
        )
    if WINDOW % patch[0]:
        raise UserError(
            f"--patch {list(patch)}: windows of {WINDOW} frames are not a multiple of its "
            f"{patch[0]} frames."
        )
    return scorer(patch) if tokenizer is None else scorer(patch, tokenizer, device)
