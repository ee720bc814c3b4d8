"""A video classifier: the pretrained encoder, its tokens made one vector, one linear layer.

B clips, T H W frames and pixels, N tokens (M of them seen), D width.
"""

from __future__ import annotations

from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from arvideo_ds.config.sizes import EncoderSpec
from arvideo_ds.models.encoder import build_encoder, encode_clips, initialize, layer_norm


class Classifier(nn.Module):
    """What is fine-tuned on labels.

    `pooling` mean: the mean of the tokens, LayerNorm, linear layer; the encoder's own last
    norm is left out, as the pooled token is normalised instead (VideoMAE, modeling_finetune.py).
    attention: the encoder's last norm, one class-attention layer, linear layer (LVMAE's ViT-L;
    timm's "map" pooling).

    `head_dropout` is the probability that a feature is zeroed before the linear layer while
    training, drawn from torch's generator as `drop_path` is. It has no weights.

    Of several label sets the classes stand one set after another: one matrix holds a linear layer
    for each.
    """

    def __init__(
        self,
        encoder: EncoderSpec,
        num_classes: int,
        *,
        pooling: str = "mean",
        drop_path: float = 0.0,
        head_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        size, attends = encoder.size, pooling == "attention"
        self.patch = encoder.geometry.patch
        self.encoder = build_encoder(encoder, drop_path=drop_path, final_norm=attends)
        self.norm = nn.Identity() if attends else layer_norm(size.width)
        self.class_attention = None
        if attends:
            ratio = size.mlp / size.width
            self.class_attention = AttentionPoolLatent(
                size.width, num_heads=size.heads, mlp_ratio=ratio, norm_layer=layer_norm
            )
            initialize(self.class_attention)
        self.dropout = nn.Dropout(head_dropout)
        self.head = nn.Linear(size.width, num_classes)
        # Near zero: the first steps move the head, not the pretrained encoder.
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    def forward(self, clips: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Logits B x classes of clips B T H W 3, uint8 or floating 0..1.

        tokens: B M, those that alone are seen; none = all.
        """
        return self.classify(self.pool(encode_clips(self.encoder, clips, self.patch, tokens)))

    def pool(self, tokens: Tensor) -> Tensor:
        """Encoded tokens B M D as one vector each, B D."""
        return tokens.mean(1) if self.class_attention is None else self.class_attention(tokens)

    def classify(self, features: Tensor) -> Tensor:
        """Logits B x classes of pooled tokens B D."""
        return self.head(self.dropout(self.norm(features)))
