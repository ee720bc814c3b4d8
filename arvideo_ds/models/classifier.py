"""A video classifier: the pretrained encoder, pooling, one linear layer.

B clips, T H W frames and pixels, N tokens (M of them seen), D width.
"""

from __future__ import annotations

from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from arvideo_ds.config.sizes import EncoderSpec
from arvideo_ds.models.encoder import (
    build_encoder,
    encode_clips,
    initialize,
    layer_norm,
    linear_head,
)


class Classifier(nn.Module):
    """The model of fine-tuning on labels.

    pooling: mean = the mean of the tokens, LayerNorm, linear layer, without the encoder's norm
    (VideoMAE, modeling_finetune.py); attention = the encoder's norm, one class-attention layer,
    linear layer (LVMAE's ViT-L; timm's "map" pooling). head_dropout: probability that a feature is
    zeroed before the linear layer in training, drawn from torch's generator as `drop_path` is.
    num_classes: of all label sets; the linear layer has their classes one set after another.
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
        self.head = linear_head(size.width, num_classes)

    def forward(self, clips: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Logits B x classes of clips B T H W 3, uint8 or floating 0..1.

        tokens: B M, the only ones that are encoded; None = all.
        """
        return self.classify(self.pool(encode_clips(self.encoder, clips, self.patch, tokens)))

    def pool(self, tokens: Tensor) -> Tensor:
        """Encoded tokens B M D to one vector per clip, B D."""
        return tokens.mean(1) if self.class_attention is None else self.class_attention(tokens)

    def classify(self, features: Tensor) -> Tensor:
        """Logits B x classes of pooled tokens B D."""
        return self.head(self.dropout(self.norm(features)))
