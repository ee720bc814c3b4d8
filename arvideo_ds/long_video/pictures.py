"""Pictures of a tokenizer's work: original, reconstruction, importance, tokens that are kept.

T H W frames and pixels, t h w token grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import repeat
from matplotlib.figure import Figure
from torch import Tensor

from arvideo_ds.evaluation.pictures import BLANK, draw_rows
from arvideo_ds.long_video.tokenizer import Tokenizer
from arvideo_ds.models.cubes import unit_pixels


@dataclass(frozen=True)
class Example:
    """Images T H W 3 in 0..1, and importance T H W, 1 where it is largest."""

    original: np.ndarray
    reconstruction: np.ndarray
    kept: np.ndarray
    importance: np.ndarray


@torch.inference_mode()
def example(tokenizer: Tokenizer, clip: Tensor) -> Example:
    """A clip T H W 3 (uint8) through the tokenizer."""
    made = tokenizer(clip[None])
    scores, _ = tokenizer.tokens(clip[None])
    original = unit_pixels(clip)

    def spread(tokens: Tensor) -> Tensor:
        pt, ph, pw = tokenizer.patch
        return repeat(tokens, "t h w -> (t pt) (h ph) (w pw)", pt=pt, ph=ph, pw=pw)

    kept = spread(made.kept[0])[..., None]
    return Example(
        np.asarray(original),
        np.asarray(made.pixels[0].clamp(0, 1)),
        np.asarray(original * kept + BLANK * (1 - kept)),
        np.asarray(spread(scores[0] / scores.max())),
    )


def draw_examples(examples: Sequence[Example], title: str) -> Figure:
    """Four rows for each clip; columns are frames."""
    rows = [
        row
        for one in examples
        for row in (
            ("original", one.original, None),
            ("reconstruction", one.reconstruction, None),
            ("tokens kept", one.kept, None),
            ("importance", one.importance, None),
        )
    ]
    return draw_rows(rows, title)
