"""What every pretraining objective is: an encoder that transfers, and a loss for each clip."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from arvideo_ds.models.encoder import Encoder


class Objective(nn.Module, ABC):
    """Base of ARVideo and its siblings."""

    encoder: Encoder

    @abstractmethod
    def forward(self, clips: Tensor, keys: Tensor) -> Tensor:
        """Loss of each clip, float32, B.

        clips: B T H W 3, uint8 (or floating 0..1). keys: int64, B; they alone decide what is
        random (arvideo_ds.randomness.draw_key).
        """
