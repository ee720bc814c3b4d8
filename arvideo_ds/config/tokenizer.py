"""The recipe of the tokenizer of long video, and what follows from its settings.

Latents are called tokens: one per cube of `model.patch`, on the token grid of the video
transformer. Source: LVMAE (arXiv 2411.13683); network after MAGVIT (arXiv 2212.05199).
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from arvideo_ds.config.schema import Recipe
from arvideo_ds.config.settings import Positive, PositiveTriple, Settings
from arvideo_ds.errors import UserError
from arvideo_ds.geometry import Geometry, Triple, num_kept

# The index of a code is computed in float32, which is exact up to here.
_MOST_CODES = 2**24
# The perceptual network halves a picture four times.
_LEAST_SIDE = 16


class CubeSettings(Settings):
    """The tokens; the network is in `tokenizer`."""

    patch: PositiveTriple
    """Frames, rows and columns of one token; powers of two."""


class TokenizerSettings(Settings):
    """Network, scorer and losses; defaults are those of LVMAE's tokenizer B."""

    filters: Positive = 64
    """Channels at the clip's resolution."""
    multipliers: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 2, 2, 4, 4)
    """Multiples of `filters` at the clip's resolution and after each halving."""
    blocks: Positive = 2
    """Residual blocks at each resolution, and in the middle."""
    levels: Annotated[tuple[Annotated[int, Field(ge=3)], ...], Field(min_length=1)] = (8,) * 6
    """Quantisation levels per dimension of a latent; their product is the number of codes (FSQ)."""
    keep_share: Annotated[float, Field(gt=0, le=1)] = 0.49
    """Share of a clip's tokens that the decoder gets, including all of the first time."""
    samples: Positive = 500
    """The choice of tokens is learnt from the mean of this many noisy choices."""
    sigma: Annotated[float, Field(gt=0)] = 0.05
    """Standard deviation of that noise; scores have 1."""
    pixel_weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of the squared error of pixels in 0..1."""
    perceptual_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the distance between VGG16 features."""
    perceptual_network: str | None = None
    """File of VGG16's weights, torchvision's state of vgg16. Nothing is downloaded."""
    adversarial_weight: Annotated[float, Field(ge=0, le=0)] = 0.0
    """Always 0, there is no adversarial loss: a run has one optimiser."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = 0.999
    """Moving average of the weights, saved beside them."""

    @property
    def num_codes(self) -> int:
        return math.prod(self.levels)

    def kept(self, geometry: Geometry) -> int:
        """Tokens that the decoder gets: all of the first time, the best of the rest."""
        return num_kept(self.keep_share, geometry.num_tokens)

    def check(self, geometry: Geometry) -> None:
        """Raise `UserError` for settings that contradict each other or the clip."""
        for axis, side in zip(("frames", "rows", "columns"), geometry.patch, strict=True):
            if side & (side - 1):
                raise UserError(
                    f"model.patch={list(geometry.patch)}: the tokenizer halves the clip step by "
                    f"step, so each side must be a power of two, but its {axis} are {side}."
                )
        needed = 1 + len(halvings(geometry.patch))
        if len(self.multipliers) != needed:
            raise UserError(
                f"tokenizer.multipliers has {len(self.multipliers)} numbers, but model.patch="
                f"{list(geometry.patch)} needs {needed}, one per resolution."
            )
        times, rows, columns = geometry.grid
        if times < 2:
            raise UserError(
                f"tokens are scored by their change over time, and data.frames={geometry.clip[0]} "
                f"gives only one time of model.patch={list(geometry.patch)}. Raise data.frames."
            )
        kept, first = self.kept(geometry), rows * columns
        if not first < kept < geometry.num_tokens:
            raise UserError(
                f"tokenizer.keep_share={self.keep_share:g} keeps {kept} of {geometry.num_tokens} "
                f"tokens; it must keep more than the {first} of the first time, and drop some."
            )
        if self.num_codes > _MOST_CODES:
            raise UserError(
                f"tokenizer.levels={list(self.levels)} gives {self.num_codes} codes; at most "
                f"{_MOST_CODES} can be indexed exactly."
            )
        if self.perceptual_weight and min(geometry.clip[1:]) < _LEAST_SIDE:
            raise UserError(
                f"tokenizer.perceptual_weight={self.perceptual_weight:g} needs frames of at least "
                f"{_LEAST_SIDE} pixels per side; data.size is {list(geometry.clip[1:])}."
            )
        if self.perceptual_weight and self.perceptual_network is None:
            raise UserError(
                f"tokenizer.perceptual_weight={self.perceptual_weight:g} needs weights: set "
                "tokenizer.perceptual_network=FILE, torchvision's vgg16-397923af.pth."
            )


class TokenizerEvaluationSettings(Settings):
    """Shards whose central clips are reconstructed while training and afterwards."""

    shards: str | None = None
    """Folder of shards to test on; null: only training."""
    every_epochs: Annotated[float, Field(gt=0)] = 1.0
    """Epochs between tests while training; the best weights are kept."""
    batch: Positive = 16
    """Clips per rank and forward pass."""


def halvings(patch: Triple) -> list[Triple]:
    """Strides of the encoder, level by level: 2 where an axis is halved; early levels halve time.

    (2, 16, 16) is reached by (2, 2, 2), (1, 2, 2), (1, 2, 2), (1, 2, 2).
    """
    steps = [side.bit_length() - 1 for side in patch]
    strides = [[2 if level < n else 1 for n in steps] for level in range(max(steps))]
    return [(t, h, w) for t, h, w in strides]


def scorer_strides(patch: Triple) -> tuple[Triple, Triple]:
    """The scorer's two strides, together a token: time in the second, space in both."""
    t, h, w = patch
    # Of two powers of two whose product is the side, the larger one, as small as possible.
    rows, columns = (1 << side.bit_length() // 2 for side in (h, w))
    return (1, rows, columns), (t, h // rows, w // columns)


def scorer_kernel(stride: Triple) -> Triple:
    """Twice the stride: a token sees its cube and half of its neighbours'."""
    t, h, w = (2 * step if step > 1 else 1 for step in stride)
    return t, h, w


class TokenizerRecipe(Recipe):
    """A run that trains the adaptive tokenizer of long video, without labels."""

    purpose: ClassVar[str] = "train a tokenizer"
    script: ClassVar[str] = "tokenizer"
    run_name: ClassVar[str] = "a run of the tokenizer"
    tested_by: ClassVar[str] = "evaluate_tokenizer"

    task: Literal["tokenizer"] = "tokenizer"
    model: CubeSettings
    tokenizer: TokenizerSettings = TokenizerSettings()
    evaluation: TokenizerEvaluationSettings = TokenizerEvaluationSettings()

    @property
    def patch(self) -> Triple:
        return self.model.patch

    @property
    def ema_decay(self) -> float | None:
        return self.tokenizer.ema_decay

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self.tokenizer.check(self.geometry)
        return self
