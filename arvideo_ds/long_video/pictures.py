"""Pictures of a tokenizer: original, reconstruction, kept tokens, importance.

T H W frames and pixels, t h w token grid.
"""

from __future__ import annotations

import numpy as np
import torch
from einops import repeat
from torch import Tensor

from arvideo_ds.evaluation.pictures import BLANK, FrameRow
from arvideo_ds.long_video.tokenizer import Tokenizer
from arvideo_ds.models.cubes import unit_pixels


@torch.inference_mode()
def example_rows(tokenizer: Tokenizer, clip: Tensor) -> list[FrameRow]:
    """Four rows of pictures, 0..1, of a clip T H W 3 (uint8); importance is 1 where largest."""
    made = tokenizer(clip[None])
    scores, _ = tokenizer.tokens(clip[None])
    original = unit_pixels(clip)

    def spread(tokens: Tensor) -> Tensor:
        pt, ph, pw = tokenizer.patch
        return repeat(tokens, "t h w -> (t pt) (h ph) (w pw)", pt=pt, ph=ph, pw=pw)

    kept = spread(made.kept[0])[..., None]
    pictures = {
        "original": original,
        "reconstruction": made.pixels[0].clamp(0, 1),
        "tokens kept": original * kept + BLANK * (1 - kept),
        "importance": spread(scores[0] / scores.max()),
    }
    return [(label, np.asarray(picture), None) for label, picture in pictures.items()]
