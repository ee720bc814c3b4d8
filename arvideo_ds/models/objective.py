"""What every pretraining objective is: an encoder that transfers, and a loss for each clip.

`MODELS` has the model of every objective, by the name of its settings in config/objectives.py.

B clips, N tokens, E encoded tokens, Q predicted ones, P values of a cube.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from arvideo_ds.config.objectives import BaseObjective
from arvideo_ds.config.sizes import EncoderSpec
from arvideo_ds.models.cubes import pick, pixel_targets, to_cubes
from arvideo_ds.models.encoder import Encoder, build_encoder
from arvideo_ds.registry import Registry


@dataclass(frozen=True)
class Draw:
    """What was drawn for a batch: tokens that are encoded, B E, and predicted, B Q."""

    encoded: Tensor
    targets: Tensor


class Objective(nn.Module, ABC):
    """Base of ARVideo and its siblings: draw tokens, predict their cubes, compare the pixels."""

    encoder: Encoder
    # Equal steps that the targets consist of, in the order in which they are predicted.
    num_predicted = 1

    def __init__(self, settings: BaseObjective, encoder: EncoderSpec) -> None:
        super().__init__()
        self.patch = encoder.geometry.patch
        self.normalize_targets = settings.normalize_targets
        self.encoder = build_encoder(encoder)

    def forward(
        self,
        clips: Tensor,
        keys: Tensor,
        scores: Tensor | None = None,
        codes: Tensor | None = None,
    ) -> Tensor:
        """Loss of each clip, float32, B: mean squared error of what is predicted of the tokens.

        clips: B T H W 3, uint8 (or floating 0..1). keys: int64, B; they alone decide what is
        random (arvideo_ds.randomness.draw_key). scores and codes: B N, what data.scores holds of
        the clips' tokens, for objectives that ask for it.
        """
        draw = self.draw(keys, scores)
        cubes = to_cubes(clips, self.patch)
        predicted = self.predict(cubes, draw).float()
        return (predicted - self.compute_targets(cubes, draw, codes)).square().mean(dim=(1, 2))

    def target_values(
        self,
        clips: Tensor,
        keys: Tensor,
        scores: Tensor | None = None,
        codes: Tensor | None = None,
    ) -> Tensor:
        """What the loss compares predictions with, B Q P float32; arguments as of `forward`."""
        return self.compute_targets(to_cubes(clips, self.patch), self.draw(keys, scores), codes)

    @property
    def zero_mean(self) -> bool:
        """Whether the mean of every target token is 0 by construction."""
        return self.normalize_targets

    @abstractmethod
    def draw(self, keys: Tensor, scores: Tensor | None = None) -> Draw:
        """Tokens that are encoded and predicted, a pure function of each clip's key and scores."""

    def compute_targets(
        self,
        cubes: Tensor,
        draw: Draw,
        codes: Tensor | None,  # noqa: ARG002
    ) -> Tensor:
        """Targets of the loss, B Q P float32: the (normalised) pixels of the target tokens."""
        return pixel_targets(pick(cubes, draw.targets), normalize=self.normalize_targets)

    @abstractmethod
    def predict(self, cubes: Tensor, draw: Draw) -> Tensor:
        """Cubes of the target tokens, from cubes B N P: B Q P. Only encoded ones are embedded."""

    def visible(self, draw: Draw) -> Tensor:
        """Tokens shown before the first prediction, B n; for pictures."""
        return draw.encoded


# `(settings, EncoderSpec, DecoderSettings)` to the model. Its attribute `encoder` is what exports
# and fine-tuning read.
MODELS: Registry[Callable[..., Objective]] = Registry(
    "objective",
    {
        "arvideo": "arvideo_ds.models.arvideo:ARVideo",
        "videomae": "arvideo_ds.models.videomae:VideoMAE",
        "lvmae": "arvideo_ds.long_video.lvmae:LVMAE",
    },
)
