"""LVMAE on one page: VideoMAE on a long clip that reconstructs only the important tokens.

    draw       a few places of the frame, visible at all times (tube masking)
    choose     the most important hidden tokens and some random ones: 15 % of all tokens
    encode     the visible tokens, full attention
    decode     them and a mask token for each chosen one, full attention
    loss       squared error on the chosen tokens' latents of a frozen tokenizer

Importance and latents are computed once (`arvideo score_tokens`) and come with the clip. The
paper ranks all tokens and has no loss on visible ones; here only hidden ones are ranked, so that
the number of predictions is the whole budget for every clip.

Source: Gundavarapu et al. 2024 (arXiv 2411.13683); docs/method.md, Relatives.

B clips, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from arvideo_ds.config.objectives import DecoderSettings, LvmaeSettings
from arvideo_ds.config.sizes import EncoderSpec
from arvideo_ds.models.objective import Draw
from arvideo_ds.models.selection import choose, priorities
from arvideo_ds.models.videomae import VideoMAE


class LVMAE(VideoMAE):
    """VideoMAE with a budget of mask tokens and latents as targets."""

    def __init__(
        self, settings: LvmaeSettings, encoder: EncoderSpec, decoder: DecoderSettings
    ) -> None:
        super().__init__(settings, encoder, decoder)
        geometry = encoder.geometry
        self.rule = settings.decoder_mask
        self.by_rule = settings.by_rule(geometry, geometry.num_tokens - self.counts.encoded)
        self.levels = settings.latent_levels if settings.targets == "latents" else None

    def chosen(self, hidden: Tensor, keys: Tensor, scores: Tensor | None) -> Tensor:
        first = choose(priorities(self.rule, keys, self.grid, scores), hidden, self.by_rule)
        rest = hidden & ~first
        return first | choose(
            priorities("random", keys, self.grid), rest, self.counts.predicted - self.by_rule
        )

    @property
    def zero_mean(self) -> bool:
        return self.levels is None and super().zero_mean

    def compute_targets(self, cubes: Tensor, draw: Draw, codes: Tensor | None) -> Tensor:
        if self.levels is None:
            return super().compute_targets(cubes, draw, codes)
        if codes is None:
            raise ValueError("latents are the targets, and the batch has no codes")
        return latents_of(codes.gather(1, draw.targets), self.levels)


def latents_of(codes: Tensor, levels: Sequence[int]) -> Tensor:
    """Latents ... len(levels) (float32, -1..1) of codes of any shape (int64).

    A code is a mixed-radix number; its first digit, in the base of the first level, is the lowest.
    Source: Mentzer et al. 2023 (arXiv 2309.15505), section 3.
    """
    numbers = []
    # Scalars: a tensor of the levels would have to be copied to the device.
    for level in levels:
        half = level // 2
        numbers.append((codes % level - half) / half)
        codes = codes // level
    return torch.stack(numbers, dim=-1)
