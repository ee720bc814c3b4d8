"""The base of pretraining objectives: an encoder that transfers, and a loss for each clip.

B clips, N tokens, E encoded tokens, Q predicted ones, P values of a cube.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from arvideo_ds.config.objectives import BaseObjective
from arvideo_ds.config.sizes import EncoderSpec
from arvideo_ds.models.cubes import pick, pixel_targets, to_cubes
from arvideo_ds.models.decoder import Alignment
from arvideo_ds.models.encoder import NORM_EPSILON, Encoder, build_encoder
from arvideo_ds.registry import Registry


@dataclass(frozen=True)
class Draw:
    """Sampled tokens of a batch: encoded ones, B E, and predicted ones, B Q."""

    encoded: Tensor
    targets: Tensor


class Objective(nn.Module, ABC):
    """Draw tokens, predict their cubes, compare the pixels; or a teacher's features of them."""

    encoder: Encoder
    # An Alignment where features of the encoded tokens are learnt.
    decoder: nn.Module
    # Steps of equal size in which the targets are predicted.
    num_predicted = 1

    def __init__(self, settings: BaseObjective, encoder: EncoderSpec) -> None:
        super().__init__()
        self.patch = encoder.geometry.patch
        self.normalize_targets = settings.normalize_targets
        self.has_teacher, self.aligned = settings.teacher is not None, settings.aligned
        self.encoder = build_encoder(encoder)
        if self.aligned:
            values = settings.target_values(encoder.geometry)
            self.decoder = Alignment(encoder.size.width, values)

    def forward(
        self, clips: Tensor, keys: Tensor, scores: Tensor | None = None, codes: Tensor | None = None
    ) -> Tensor:
        """Loss of each clip, float32, B: the mean of `errors` over the predicted tokens.

        clips: B T H W 3, uint8 (or floating 0..1). keys: int64, B; they determine all randomness
        (arvideo_ds.randomness.draw_key). scores and codes: B N, from data.scores, for objectives
        that need them; with a teacher codes are its features, B N D (of aligned tokens B E D).
        """
        return self.losses(clips, self.draw(keys, scores), codes)

    def losses(self, clips: Tensor, draw: Draw, codes: Tensor | None) -> Tensor:
        """Loss of each clip for the sampled tokens; arguments as in `forward`.

        Everything but the draw, whose 64-bit constants no compiled kernel can have.
        """
        cubes = to_cubes(clips, self.patch)
        if self.aligned:
            predicted = self.decoder(self.encode(self.encoder, cubes, draw)).float()
        else:
            predicted = self.predict(cubes, draw).float()
        return self.errors(predicted, self.compute_targets(cubes, draw, codes)).mean(dim=(1, 2))

    def errors(self, predicted: Tensor, targets: Tensor) -> Tensor:
        """Error of each predicted value: the square, for features smooth L1 with beta 1.

        Source of smooth L1: Masked Video Distillation (arXiv 2212.04500), official code; G2SD
        (arXiv 2302.14771) has beta 2.
        """
        if self.has_teacher:
            return F.smooth_l1_loss(predicted, targets, reduction="none")
        return (predicted - targets).square()

    def target_values(
        self, clips: Tensor, keys: Tensor, scores: Tensor | None = None, codes: Tensor | None = None
    ) -> Tensor:
        """Targets of the loss, B Q P float32; arguments as in `forward`."""
        return self.compute_targets(to_cubes(clips, self.patch), self.draw(keys, scores), codes)

    @property
    def zero_mean(self) -> bool:
        """Whether the mean of every target token is 0 by construction."""
        return self.normalize_targets and not self.has_teacher

    @abstractmethod
    def draw(self, keys: Tensor, scores: Tensor | None = None) -> Draw:
        """Sample tokens, as a pure function of each clip's key and scores."""

    def compute_targets(self, cubes: Tensor, draw: Draw, codes: Tensor | None) -> Tensor:
        """Targets of the loss, B Q P float32: the (normalised) pixels of the target tokens.

        With a teacher its features of them, each token normalised without learnt weights, as in
        Masked Video Distillation's and G2SD's official codes.
        """
        if self.has_teacher:
            if codes is None:
                raise ValueError("a teacher's features are the targets, and none were given")
            features = (codes if self.aligned else pick(codes, draw.targets)).float()
            return F.layer_norm(features, features.shape[-1:], eps=NORM_EPSILON)
        return pixel_targets(pick(cubes, draw.targets), normalize=self.normalize_targets)

    def encode(self, encoder: Encoder, cubes: Tensor, draw: Draw) -> Tensor:
        """Output of an encoder, the objective's own or a teacher's, for the encoded tokens: B E D.

        cubes: B N P.
        """
        return encoder(pick(cubes, draw.encoded), draw.encoded)

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
