"""What every pretraining objective is: an encoder that transfers, and a loss for each clip.

B clips, N tokens, E encoded tokens, Q predicted ones, P values of a cube.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from arvideo_ds.config.schema import PretrainRecipe
from arvideo_ds.models.cubes import pick, pixel_targets, to_cubes
from arvideo_ds.models.encoder import Encoder, build_encoder


@dataclass(frozen=True)
class Draw:
    """What was drawn for a batch: tokens that are encoded, B E, and predicted, B Q."""

    encoded: Tensor
    targets: Tensor


class Objective(nn.Module, ABC):
    """Base of ARVideo and its siblings: draw tokens, predict their cubes, compare the pixels."""

    encoder: Encoder
    # The targets stand in so many equal steps, in the order in which they are predicted.
    num_predicted = 1

    def __init__(self, recipe: PretrainRecipe) -> None:
        super().__init__()
        self.patch = recipe.patch
        self.normalize_targets = recipe.objective.normalize_targets
        self.encoder = build_encoder(recipe)

    def forward(self, clips: Tensor, keys: Tensor) -> Tensor:
        """Loss of each clip, float32, B: mean squared error of the predicted tokens' pixels.

        clips: B T H W 3, uint8 (or floating 0..1). keys: int64, B; they alone decide what is
        random (arvideo_ds.randomness.draw_key).
        """
        draw = self.draw(keys)
        cubes = to_cubes(clips, self.patch)
        predicted = self.predict(cubes, draw).float()
        wanted = pixel_targets(pick(cubes, draw.targets), normalize=self.normalize_targets)
        return (predicted - wanted).square().mean(dim=(1, 2))

    @abstractmethod
    def draw(self, keys: Tensor) -> Draw:
        """What the clips of these keys see and predict; a pure function of each key."""

    @abstractmethod
    def predict(self, cubes: Tensor, draw: Draw) -> Tensor:
        """Cubes of the target tokens, from cubes B N P: B Q P. Only encoded ones are embedded."""

    def given(self, draw: Draw) -> Tensor:
        """Tokens that are there before any is predicted, B n; for pictures."""
        return draw.encoded
