"""A video classifier: the pretrained encoder, mean pooling, LayerNorm, one linear layer.

B clips, T H W frames and pixels, N tokens, D width.
"""

from __future__ import annotations

from torch import Tensor, nn

from arvideo_ds.config.schema import Recipe
from arvideo_ds.models.encoder import build_encoder, encode_clips, layer_norm


class Classifier(nn.Module):
    """What is fine-tuned on labels (VideoMAE's protocol, METHOD, section 4).

    The encoder's own last norm is left out: the pooled token is normalised instead.
    """

    def __init__(self, recipe: Recipe, num_classes: int, *, drop_path: float = 0.0) -> None:
        super().__init__()
        self.patch = recipe.patch
        self.encoder = build_encoder(recipe, drop_path=drop_path, final_norm=False)
        self.norm = layer_norm(recipe.size.width)
        self.head = nn.Linear(recipe.size.width, num_classes)
        # Near zero: the first steps move the head, not the pretrained encoder.
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    def forward(self, clips: Tensor) -> Tensor:
        """Logits B x classes of clips B T H W 3, uint8 or floating 0..1."""
        return self.head(self.norm(self.features(clips)))

    def features(self, clips: Tensor) -> Tensor:
        """Mean of the tokens, B D, before the norm."""
        return encode_clips(self.encoder, clips, self.patch).mean(1)
