"""Perceptual distance of two clips: that of their features in a classifier of images.

B clips, T frames of H W pixels.
"""

from __future__ import annotations

from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import vgg16

from arvideo_ds.config.tokenizer import TokenizerSettings
from arvideo_ds.models.cubes import pixel_statistics
from arvideo_ds.models.weight_files import State, load_state, read_weights

# VGG16's layers before each pooling: relu1_2, relu2_2, relu3_3, relu4_3, relu5_3.
_LAYERS = (3, 8, 15, 22, 29)
_FEATURES = "features."


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
            total = total + difference.flatten(1).mean(dim=1).unflatten(0, (len(decoded), -1)).mean(
                1
            )
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
    return Perceptual(_vgg16(read_weights(path), path))


def _vgg16(state: State, path: Path) -> nn.Sequential:
    # Without values: the classifier alone would be half a gigabyte.
    with torch.device("meta"):
        features = vgg16(weights=None, init_weights=False).features[: _LAYERS[-1] + 1]
    weights = {
        name.removeprefix(_FEATURES): value.float()
        for name, value in state.items()
        if name.startswith(_FEATURES)
    }
    wrong = (
        f"tokenizer.perceptual_network={path} is not torchvision's vgg16 (the file "
        "vgg16-397923af.pth)"
    )
    load_state(features, weights, wrong, assign=True)
    for layer in features:
        # In place it would overwrite a tensor that autograd may have saved.
        if isinstance(layer, nn.ReLU):
            layer.inplace = False
    return features
