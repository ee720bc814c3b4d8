"""Training of the adaptive tokenizer: squared error of the pixels, and perceptual distance.

B clips, T frames of H W pixels.
"""

from __future__ import annotations

from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import vgg16

from arvideo_ds.config import TokenizerRecipe
from arvideo_ds.config.tokenizer import TokenizerSettings
from arvideo_ds.data.loader import Batch
from arvideo_ds.long_video.tokenizer import Reconstruction, Tokenizer
from arvideo_ds.models.cubes import pixel_statistics, unit_pixels
from arvideo_ds.models.weight_files import load_state, read_weights

# VGG16's layers before each pooling: relu1_2, relu2_2, relu3_3, relu4_3, relu5_3.
_LAYERS = (3, 8, 15, 22, 29)
_FEATURES = "features."


class TrainTokenizer(nn.Module):
    """In training the mean loss over valid clips (0 if there are none), else reconstructions.

    The token scorer has no loss of its own; its gradient comes through the choice of tokens.
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


class Perceptual:
    """Distance of VGG16's features, frame by frame: LPIPS without its learnt weights.

    At each of five depths features are normalised to length 1 and their squared differences are
    averaged over places; the five are summed. Source: Zhang et al. 2018 (arXiv 1801.03924),
    section 3.

    Not a module, so that optimiser, ZeRO and checkpoints do not see its weights. It moves to the
    device of its inputs and computes in float32, or TF32 where cuDNN may.
    """

    def __init__(self, features: nn.Sequential) -> None:
        self._features = features.eval().requires_grad_(requires_grad=False)

    def __call__(self, decoded: Tensor, clips: Tensor) -> Tensor:
        """Distance of each clip, B; both B T H W 3, float32, 0..1."""
        self._features.to(decoded.device)
        total = decoded.new_zeros(len(decoded))
        for a, b in zip(self._depths(decoded), self._depths(clips), strict=True):
            difference = (F.normalize(a) - F.normalize(b)).square().sum(dim=1)
            per_frame = difference.flatten(1).mean(dim=1)
            total = total + per_frame.unflatten(0, (len(decoded), -1)).mean(1)
        return total

    def _depths(self, clips: Tensor) -> list[Tensor]:
        mean, std = pixel_statistics(clips.device)
        x = rearrange((clips - mean) / std, "b t h w c -> (b t) c h w")
        features = []
        for number, layer in enumerate(self._features):
            x = layer(x)
            if number in _LAYERS:
                features.append(x)
        return features


def load_perceptual(settings: TokenizerSettings) -> Perceptual | None:
    """The network of `tokenizer.perceptual_network`; None where the weight of its loss is 0.

    Errors: `UserError` where the file is missing, damaged, or not torchvision's VGG16.
    """
    if not settings.perceptual_weight:
        return None
    path = Path(settings.perceptual_network or "")
    weights = {
        name.removeprefix(_FEATURES): value.float()
        for name, value in read_weights(path).items()
        if name.startswith(_FEATURES)
    }
    # Without values: the classifier alone would be half a gigabyte.
    with torch.device("meta"):
        features = vgg16(weights=None, init_weights=False).features[: _LAYERS[-1] + 1]
    wrong = (
        f"tokenizer.perceptual_network={path} is not torchvision's vgg16 (the file "
        "vgg16-397923af.pth)"
    )
    load_state(features, weights, wrong, assign=True)
    for layer in features:
        # In place it would overwrite a tensor that autograd may have saved.
        if isinstance(layer, nn.ReLU):
            layer.inplace = False
    return Perceptual(features)
