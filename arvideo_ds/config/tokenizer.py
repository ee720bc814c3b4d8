"""What a recipe may say of the tokenizer of long video, and what follows from it.

Latents are called tokens: they stand on the token grid of the video transformer, one for each cube
of `model.patch`. Source: LVMAE (arXiv 2411.13683); network after MAGVIT (arXiv 2212.05199).
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from arvideo_ds.config.schema import Recipe
from arvideo_ds.config.settings import Positive, PositiveTriple, Settings
from arvideo_ds.errors import UserError
from arvideo_ds.geometry import Geometry, Triple, num_kept

# Above it, a code's number is no longer exact in float32, in which it is computed.
_MOST_CODES = 2**24
# The perceptual network halves a picture four times.
_LEAST_SIDE = 16
_AXES = ("frames", "rows", "columns")


class CubeSettings(Settings):
    """The `model` section of a tokenizer, which has no size of the table of transformers."""

    # Frames, rows and columns of one token; powers of two.
    patch: PositiveTriple


class TokenizerSettings(Settings):
    """Network, scorer and losses; defaults are those of LVMAE's tokenizer B."""

    # Channels at the clip's own resolution, and their multiples there and after each halving.
    filters: Positive = 64
    multipliers: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 2, 2, 4, 4)
    # Residual blocks at each resolution, and in the middle.
    blocks: Positive = 2
    # Values of each number of a latent; their product is the number of codes (FSQ).
    levels: Annotated[tuple[Annotated[int, Field(ge=3)], ...], Field(min_length=1)] = (8,) * 6
    # Share of a clip's tokens that the decoder gets, those of the first time among them.
    keep_share: Annotated[float, Field(gt=0, le=1)] = 0.49
    # The choice is learnt by the mean of `samples` choices under noise of deviation `sigma`; scores
    # have deviation 1.
    samples: Positive = 500
    sigma: Annotated[float, Field(gt=0)] = 0.05
    # Weights of the loss' terms: squared error of pixels of 0..1, and distance of the features of
    # a VGG16.
    pixel_weight: Annotated[float, Field(gt=0)] = 1.0
    perceptual_weight: Annotated[float, Field(ge=0)] = 0.0
    # Its weights: torchvision's state of vgg16, a file. Nothing is downloaded.
    perceptual_network: str | None = None
    adversarial_weight: float = 0.0
    # Moving average of the weights, saved beside them.
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = 0.999

    @field_validator("adversarial_weight")
    @classmethod
    def _no_adversary(cls, value: float) -> float:
        if value:
            raise ValueError(
                "there is no adversarial loss here: its discriminator needs an optimiser of its "
                "own, and a run has one DeepSpeed engine with one. Leave the key out"
            )
        return value

    @property
    def num_codes(self) -> int:
        return math.prod(self.levels)

    def kept(self, geometry: Geometry) -> int:
        """Tokens of a clip that the decoder gets: all of the first time, the best of the others."""
        return num_kept(self.keep_share, geometry.num_tokens)

    def check(self, geometry: Geometry) -> None:
        """Raise `UserError` for settings that contradict each other or the clip."""
        _require_powers_of_two(geometry.patch)
        needed = 1 + len(halvings(geometry.patch))
        if len(self.multipliers) != needed:
            raise UserError(
                f"tokenizer.multipliers has {len(self.multipliers)} numbers, but model.patch="
                f"{list(geometry.patch)} is reached in {needed - 1} halvings: give {needed}, one "
                "for each resolution."
            )
        times, rows, columns = geometry.grid
        if times < 2:
            raise UserError(
                f"tokens are scored by their change over time, and data.frames={geometry.clip[0]} "
                f"makes only one time of model.patch={list(geometry.patch)}. Raise data.frames."
            )
        kept, first = self.kept(geometry), rows * columns
        if not first < kept < geometry.num_tokens:
            raise UserError(
                f"tokenizer.keep_share={self.keep_share:g} keeps {kept} of {geometry.num_tokens} "
                f"tokens; it must keep more than the {first} of the first time, which always stay, "
                "and leave some out."
            )
        if self.num_codes > _MOST_CODES:
            raise UserError(
                f"tokenizer.levels={list(self.levels)} makes {self.num_codes} codes; no more than "
                f"{_MOST_CODES} can be numbered exactly."
            )
        if self.perceptual_weight and min(geometry.clip[1:]) < _LEAST_SIDE:
            raise UserError(
                f"tokenizer.perceptual_weight={self.perceptual_weight:g} looks at pictures of at "
                f"least {_LEAST_SIDE} pixels a side; data.size is {list(geometry.clip[1:])}."
            )
        if self.perceptual_weight and self.perceptual_network is None:
            raise UserError(
                f"tokenizer.perceptual_weight={self.perceptual_weight:g} needs the weights of a "
                "network: give tokenizer.perceptual_network=FILE, torchvision's state of vgg16 "
                "(vgg16-397923af.pth). Nothing is downloaded."
            )


class TokenizerEvaluationSettings(Settings):
    """Shards whose central clips are reconstructed while training and afterwards."""

    shards: str | None = None
    every_epochs: Annotated[float, Field(gt=0)] = 1.0
    # Clips per rank and forward pass.
    batch: Positive = 16


def halvings(patch: Triple) -> list[Triple]:
    """How the encoder shrinks, level by level: 2 where an axis is halved. Early levels halve time.

    (2, 16, 16) is reached by (2, 2, 2), (1, 2, 2), (1, 2, 2), (1, 2, 2).
    """
    steps = [side.bit_length() - 1 for side in patch]
    strides = [[2 if number < n else 1 for n in steps] for number in range(max(steps))]
    return [(t, h, w) for t, h, w in strides]


def scorer_strides(patch: Triple) -> tuple[Triple, Triple]:
    """The scorer's two strides, together a token: time in the second, space in both."""
    t, h, w = patch
    first = (1, _root(h), _root(w))
    return first, (t, h // first[1], w // first[2])


def scorer_kernel(stride: Triple) -> Triple:
    """Twice the stride: a token sees its cube and half of its neighbours'."""
    t, h, w = (2 * step if step > 1 else 1 for step in stride)
    return t, h, w


def _root(side: int) -> int:
    """Of two powers of two whose product is `side` the larger, and as small as can be."""
    return 1 << side.bit_length() // 2


def _require_powers_of_two(patch: Triple) -> None:
    for axis, side in zip(_AXES, patch, strict=True):
        if side & (side - 1):
            raise UserError(
                f"model.patch={list(patch)}: the tokenizer halves the clip step by step, so each "
                f"side must be a power of two, but its {axis} are {side}."
            )


class TokenizerRecipe(Recipe):
    """A run that trains the adaptive tokenizer of long video; it needs no labels."""

    purpose: ClassVar[str] = "train a tokenizer"
    script: ClassVar[str] = "tokenizer"
    run_name: ClassVar[str] = "a run of the tokenizer"
    tested_by: ClassVar[str] = "evaluate_tokenizer"

    task: Literal["tokenizer"] = "tokenizer"
    # Convolutions have no size of the table, so there is no key that would say one.
    model: CubeSettings
    tokenizer: TokenizerSettings = TokenizerSettings()
    evaluation: TokenizerEvaluationSettings = TokenizerEvaluationSettings()

    @property
    def patch(self) -> Triple:
        return self.model.patch

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self.tokenizer.check(self.geometry)
        return self
