"""The base of pretraining objectives: an encoder that transfers, and a loss for each clip.

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
    """Sampled tokens of a batch: encoded ones, B E, and predicted ones, B Q."""

    encoded: Tensor
    targets: Tensor


class Objective(nn.Module, ABC):
    """Draw tokens, predict their cubes, compare the pixels."""

    encoder: Encoder
    # Steps of equal size in which the targets are predicted.
    num_predicted = 1

    def __init__(self, settings: BaseObjective, encoder: EncoderSpec) -> None:
        super().__init__()
        self.patch = encoder.geometry.patch
        self.normalize_targets = settings.normalize_targets
        self.encoder = build_encoder(encoder)

    def forward(
        self, clips: Tensor, keys: Tensor, scores: Tensor | None = None, codes: Tensor | None = None
    ) -> Tensor:
        """Loss of each clip, float32, B: mean squared error over the predicted tokens.

        clips: B T H W 3, uint8 (or floating 0..1). keys: int64, B; they determine all randomness
        (arvideo_ds.randomness.draw_key). scores and codes: B N, from data.scores, for objectives
        that need them.
        """
        return self.losses(clips, self.draw(keys, scores), codes)

    def losses(self, clips: Tensor, draw: Draw, codes: Tensor | None) -> Tensor:
        """Loss of each clip for the sampled tokens; arguments as in `forward`.

        Everything but the draw, whose 64-bit constants no compiled kernel can have.
        """
        cubes = to_cubes(clips, self.patch)
        predicted = self.predict(cubes, draw).float()
        return (predicted - self.compute_targets(cubes, draw, codes)).square().mean(dim=(1, 2))

    def target_values(
        self, clips: Tensor, keys: Tensor, scores: Tensor | None = None, codes: Tensor | None = None
    ) -> Tensor:
        """Targets of the loss, B Q P float32; arguments as in `forward`."""
        return self.compute_targets(to_cubes(clips, self.patch), self.draw(keys, scores), codes)

    @property
    def zero_mean(self) -> bool:
        """Whether the mean of every target token is 0 by construction."""
        return self.normalize_targets

    @abstractmethod
    def draw(self, keys: Tensor, scores: Tensor | None = None) -> Draw:
        """Sample tokens, as a pure function of each clip's key and scores."""

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
        """Predict the cubes of the target tokens from cubes B N P: B Q P."""

    def visible(self, draw: Draw) -> Tensor:
        """Tokens shown before the first prediction, B n; for pictures."""
        return draw.encoded


# By the names in config/objectives.py: `(settings, EncoderSpec, DecoderSettings)` to the model,
# whose attribute `encoder` is exported and fine-tuned.
MODELS: Registry[Callable[..., Objective]] = Registry(
    "objective",
    {
        "arvideo": "arvideo_ds.models.arvideo:ARVideo",
        "videomae": "arvideo_ds.models.videomae:VideoMAE",
        "lvmae": "arvideo_ds.long_video.lvmae:LVMAE",
    },
)
