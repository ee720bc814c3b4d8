"""Training the adaptive tokenizer: the distance of the decoded clip from the clip."""

from __future__ import annotations

from torch import Tensor, nn

from arvideo_ds.config import TokenizerRecipe
from arvideo_ds.data.loader import Batch
from arvideo_ds.long_video.perceptual import load_perceptual
from arvideo_ds.long_video.tokenizer import Reconstruction, Tokenizer
from arvideo_ds.models.cubes import unit_pixels


class TrainTokenizer(nn.Module):
    """While training the mean loss over clips that decoded (0 if none did), else reconstructions.

    The network that scores tokens has no loss of its own: its gradient is that of the choice of
    the tokens that the decoder gets.
    """

    def __init__(self, recipe: TokenizerRecipe) -> None:
        super().__init__()
        self.settings = recipe.tokenizer
        self.model = Tokenizer(recipe.patch, recipe.tokenizer)
        self.perceptual = load_perceptual(recipe.tokenizer)

    def forward(self, batch: Batch) -> Tensor | Reconstruction:
        if not self.training:
            return self.model(batch.clips)
        decoded = self.model(batch.clips, batch.keys).pixels
        clips = unit_pixels(batch.clips)
        per_clip = self.settings.pixel_weight * (decoded - clips).square().mean(dim=(1, 2, 3, 4))
        if self.perceptual is not None:
            distance = self.perceptual(decoded, clips)
            per_clip = per_clip + self.settings.perceptual_weight * distance
        valid = batch.valid.to(per_clip.dtype)
        return (per_clip * valid).sum() / valid.sum().clamp(min=1)
