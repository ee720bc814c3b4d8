"""A frozen encoder whose features are the targets of pretraining.

B clips, N tokens, D its width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arvideo_ds.geometry import Triple
from arvideo_ds.models.encoder import Encoder, encode_clips


class Teacher:
    """Features of whole clips by an encoder in evaluation mode, without gradients.

    Not an `nn.Module`: a module that has a teacher has none of its weights, so neither the
    optimiser, ZeRO's partitions, checkpoints nor exports have them. report: what was loaded.
    """

    def __init__(self, encoder: Encoder, patch: Triple, dtype: torch.dtype, report: str) -> None:
        self.encoder = encoder.to(dtype).requires_grad_(False).eval()
        self.patch = patch
        self.report = report

    def move_to(self, device: torch.device) -> None:
        if self.encoder.positions.device != device:
            self.encoder.to(device)

    def features(self, clips: Tensor) -> Tensor:
        """Clips B T H W 3 to the encoder's output, B N D, of its precision."""
        return encode_clips(self.encoder, clips, self.patch)
